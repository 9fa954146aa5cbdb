#include "conformance/nccl_mock.h"

#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::mock {
namespace {

constexpr std::chrono::microseconds kPause{50};

struct Event {
  std::atomic<bool> done{false};
};
using EventPointer = std::shared_ptr<Event>;

EventPointer& event_of(DeviceEvent event) { return *static_cast<EventPointer*>(event); }

at::Tensor view(const void* data, std::size_t count, c10::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {static_cast<std::int64_t>(count)},
                       at::TensorOptions().dtype(type));
}

}  // namespace

// Device

Device::Stream::~Stream() {
  {
    const std::lock_guard lock(mutex);
    stop = true;
    changed.notify_all();
  }
  thread.join();
}

Device::~Device() = default;

DeviceStream Device::make_stream() {
  auto stream = std::make_unique<Stream>();
  stream->thread = std::thread([raw = stream.get()] {
    std::unique_lock lock(raw->mutex);
    while (true) {
      raw->changed.wait(lock, [&] { return raw->stop || !raw->queue.empty(); });
      if (raw->queue.empty()) return;
      auto what = std::move(raw->queue.front());
      raw->queue.pop_front();
      lock.unlock();
      what();
      lock.lock();
    }
  });
  const std::lock_guard lock(mutex_);
  Stream* const raw = stream.get();
  streams_[raw] = std::move(stream);
  return raw;
}

void Device::push(DeviceStream stream, std::function<void()> what) {
  auto& target = *static_cast<Stream*>(stream);
  const std::lock_guard lock(target.mutex);
  target.queue.push_back(std::move(what));
  target.changed.notify_all();
}

void Device::drop_stream(DeviceStream stream) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = streams_.find(static_cast<Stream*>(stream));
  if (found == streams_.end()) return;
  dropped_.push_back(std::move(found->second));  // joined with the device
  streams_.erase(found);
}

DeviceEvent Device::record(DeviceStream stream) {
  auto event = std::make_shared<Event>();
  if (stream == nullptr) {
    event->done = true;
  } else {
    push(stream, [event] { event->done = true; });
  }
  return new EventPointer(std::move(event));
}

void Device::wait(DeviceStream stream, DeviceEvent event) {
  push(stream, [event = event_of(event)] {
    while (!event->done) std::this_thread::sleep_for(kPause);
  });
}

bool Device::done(DeviceEvent event) {
  if (broken) throw CommError("comm.nccl", "device 0: cudaEventQuery failed: mocked (code 700)");
  return event_of(event)->done;
}

void Device::drop_event(DeviceEvent event) noexcept { delete static_cast<EventPointer*>(event); }

// Nccl

struct Nccl::World {
  int size = 0;
  int arrived = 0;
  std::vector<Communicator> ranks;
  struct Arrival {
    int rank = 0;
    int place = 0;
    int color = 0;
    int key = 0;
    NcclComm* out = nullptr;
    NcclConfig config;
  };
  struct Split {
    std::vector<Arrival> arrivals;
    bool done = false;
  };
  std::map<int, Split> splits;
};

struct Nccl::Handle {
  std::shared_ptr<World> world;
  Communicator comm;
  int place = 0;
  std::string name;
  int splits = 0;
  std::atomic<bool> aborted{false};
  bool ended = false;
};

thread_local int Nccl::depth = 0;
thread_local std::vector<Nccl::Step> Nccl::group;

Nccl::Nccl() = default;
Nccl::~Nccl() = default;

std::vector<std::string> Nccl::log(int rank) {
  const std::lock_guard lock(mutex_);
  return logs_[rank];
}

int Nccl::count(int rank, const std::string& part) {
  const auto lines = log(rank);
  return static_cast<int>(std::count_if(lines.begin(), lines.end(), [&](const std::string& line) {
    return line.find(part) != std::string::npos;
  }));
}

Nccl::Handle* Nccl::make_handle(std::shared_ptr<World> world, const Communicator& comm, int place,
                                const NcclConfig& config) {
  handles_.push_back(
      std::unique_ptr<Handle>(new Handle{std::move(world), comm, place, config.name}));
  logs_[place].push_back(
      fmt::format("{}: made, CTAs {} to {}", config.name, config.min_ctas, config.max_ctas));
  return handles_.back().get();
}

NcclResult Nccl::get_unique_id(NcclId& id) {
  const std::lock_guard lock(mutex_);
  const auto text = fmt::format("id {}", ++ids_);
  std::copy(text.begin(), text.end(), id.bytes.begin());
  return NcclResult::kSuccess;
}

NcclResult Nccl::init_rank(NcclComm& comm, int size, const NcclId& id, int rank,
                           const NcclConfig& config) {
  const std::lock_guard lock(mutex_);
  auto& world = worlds_[std::string(id.bytes.data(), id.bytes.size())];
  if (!world) {
    world = std::make_shared<World>();
    world->size = size;
    world->ranks = make_thread_world(size);
  }
  ++world->arrived;
  comm = make_handle(world, world->ranks[rank], rank, config);
  return NcclResult::kInProgress;
}

NcclResult Nccl::split(NcclComm parent, int color, int key, NcclComm& comm,
                       const NcclConfig& config) {
  const std::lock_guard lock(mutex_);
  auto& handle = *static_cast<Handle*>(parent);
  const int index = handle.splits++;
  auto& split = handle.world->splits[index];
  split.arrivals.push_back({handle.comm.rank(), handle.place, color, key, &comm, config});
  if (static_cast<int>(split.arrivals.size()) == handle.world->size) {
    finish_split(*handle.world, index);
  }
  return NcclResult::kInProgress;
}

void Nccl::finish_split(World& world, int index) {
  auto& split = world.splits[index];
  std::map<int, std::vector<World::Arrival*>> colors;
  for (auto& arrival : split.arrivals) {
    if (arrival.color >= 0) colors[arrival.color].push_back(&arrival);
  }
  for (auto& [color, members] : colors) {
    std::sort(members.begin(), members.end(), [](const auto* a, const auto* b) {
      return std::pair(a->key, a->rank) < std::pair(b->key, b->rank);
    });
    auto child = std::make_shared<World>();
    child->size = child->arrived = static_cast<int>(members.size());
    child->ranks = make_thread_world(child->size);
    for (int r = 0; r < child->size; ++r) {
      *members[r]->out = make_handle(child, child->ranks[r], members[r]->place, members[r]->config);
    }
  }
  split.done = true;
}

NcclResult Nccl::async_error(NcclComm comm, NcclResult& state) {
  if (comm == nullptr) return NcclResult::kInvalidArgument;
  auto& handle = *static_cast<Handle*>(comm);
  {
    const std::lock_guard lock(faults);
    if (const auto found = async_errors.find(handle.place); found != async_errors.end()) {
      state = found->second;
      return NcclResult::kSuccess;
    }
  }
  const std::lock_guard lock(mutex_);
  const bool made = handle.world->arrived == handle.world->size && !init_hangs;
  const bool split = handle.splits > 0 && !handle.world->splits[handle.splits - 1].done;
  state = made && !split ? NcclResult::kSuccess : NcclResult::kInProgress;
  return NcclResult::kSuccess;
}

NcclResult Nccl::finalize(NcclComm comm) {
  const std::lock_guard lock(mutex_);
  const auto& handle = *static_cast<Handle*>(comm);
  logs_[handle.place].push_back(handle.name + ": finalize");
  return NcclResult::kInProgress;
}

NcclResult Nccl::destroy(NcclComm comm) {
  const std::lock_guard lock(mutex_);
  const auto& handle = *static_cast<Handle*>(comm);
  logs_[handle.place].push_back(handle.name + ": destroy");
  return NcclResult::kSuccess;
}

NcclResult Nccl::abort(NcclComm comm) {
  std::this_thread::sleep_for(std::chrono::milliseconds(abort_takes_ms));
  auto& handle = *static_cast<Handle*>(comm);
  {
    const std::lock_guard lock(mutex_);
    logs_[handle.place].push_back(handle.name + ": abort");
  }
  // What is under way ends on all ranks, but the others' streams are told only by their own abort.
  handle.comm.abort("mocked abort");
  handle.aborted = true;
  return NcclResult::kSuccess;
}

NcclResult Nccl::group_start() {
  ++depth;
  return NcclResult::kSuccess;
}

NcclResult Nccl::group_end() {
  if (--depth > 0 || group.empty()) return NcclResult::kSuccess;
  const DeviceStream stream = group.front().stream;
  Device::push(stream, [steps = std::exchange(group, {})] { run(steps); });
  return NcclResult::kSuccess;
}

NcclResult Nccl::add(const std::string& name, const std::string& what, Step step) {
  Handle& handle = *step.handle;
  {
    const std::lock_guard lock(faults);
    const auto found = failures.find({handle.place, name});
    if (found != failures.end()) return found->second;
  }
  {
    const std::lock_guard lock(mutex_);
    logs_[handle.place].push_back(
        fmt::format("{}: {}{}", handle.name, what, depth > 0 ? ", grouped" : ""));
  }
  group.push_back(std::move(step));
  if (depth == 0) {
    depth = 1;
    return group_end();
  }
  return NcclResult::kSuccess;
}

// On the stream's thread: the calls of a group start together. What fails hangs until this rank
// aborts the communicator, as kernels do.
void Nccl::run(const std::vector<Step>& steps) {
  Handle& handle = *steps.front().handle;
  std::vector<std::pair<const Step*, Work>> works;
  std::vector<Transfer> sends;
  std::vector<Transfer> receives;
  for (const Step& step : steps) {
    if (step.start) {
      works.emplace_back(&step, step.start(handle.comm));
    } else {
      (step.sends ? sends : receives).push_back({step.peer, &step.tensor});
    }
  }
  if (!sends.empty() || !receives.empty()) {
    works.emplace_back(nullptr, handle.comm.send_receive(sends, receives));
  }
  bool good = true;
  for (auto& [step, work] : works) {
    while (!work.done() && !handle.aborted) std::this_thread::sleep_for(kPause);
    try {
      if (!work.done()) throw CommError("mock", "aborted");
      work.wait();
      if (step != nullptr && step->finish) step->finish(work);
    } catch (const Error&) {
      good = false;
    }
  }
  while (!good && !handle.aborted) std::this_thread::sleep_for(kPause);
}

NcclResult Nccl::all_reduce(const void* send, void* receive, std::size_t count,
                            c10::ScalarType type, ReduceOp op, NcclComm comm, DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  step.start = [=](Communicator& to) {
    auto tensor = view(receive, count, type);
    if (send != receive) tensor.copy_(view(send, count, type));
    return to.all_reduce_(tensor, op);
  };
  return add("all_reduce", fmt::format("all_reduce {} {}", count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::reduce(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                        ReduceOp op, int root, NcclComm comm, DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  auto buffer = std::make_shared<at::Tensor>();
  step.start = [=](Communicator& to) {
    *buffer = view(send, count, type).clone();
    return to.all_reduce_(*buffer, op);
  };
  step.finish = [=, rank = step.handle->comm.rank()](Work&) {
    if (rank == root) view(receive, count, type).copy_(*buffer);
  };
  return add("reduce", fmt::format("reduce to {}, {} {}", root, count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::broadcast(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                           int root, NcclComm comm, DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  step.start = [=](Communicator& to) {
    auto tensor = view(receive, count, type);
    if (to.rank() == root && send != receive) tensor.copy_(view(send, count, type));
    return to.broadcast_(tensor, root);
  };
  return add("broadcast", fmt::format("broadcast of {}, {} {}", root, count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::all_gather(const void* send, void* receive, std::size_t count,
                            c10::ScalarType type, NcclComm comm, DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  step.start = [=](Communicator& to) {
    const std::vector<std::int64_t> rows(to.size(), static_cast<std::int64_t>(count));
    return to.all_gather(view(send, count, type), rows);
  };
  step.finish = [=, size = static_cast<std::size_t>(step.handle->comm.size())](Work& work) {
    view(receive, count * size, type).copy_(work.result());
  };
  return add("all_gather", fmt::format("all_gather {} {}", count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::reduce_scatter(const void* send, void* receive, std::size_t count,
                                c10::ScalarType type, ReduceOp, NcclComm comm,
                                DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  step.start = [=](Communicator& to) {
    const std::vector<std::int64_t> rows(to.size(), static_cast<std::int64_t>(count));
    return to.reduce_scatter(view(send, count * rows.size(), type), rows);
  };
  step.finish = [=](Work& work) { view(receive, count, type).copy_(work.result()); };
  return add("reduce_scatter", fmt::format("reduce_scatter {} {}", count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::add_message(bool sends, const void* data, std::size_t count, c10::ScalarType type,
                             int peer, NcclComm comm, DeviceStream stream) {
  Step step{static_cast<Handle*>(comm), stream};
  step.sends = sends;
  step.peer = peer;
  step.tensor = view(data, count, type);
  const char* name = sends ? "send" : "receive";
  return add(name, fmt::format("{} {}, {} {}", name, peer, count, c10::toString(type)),
             std::move(step));
}

NcclResult Nccl::send(const void* data, std::size_t count, c10::ScalarType type, int peer,
                      NcclComm comm, DeviceStream stream) {
  return add_message(true, data, count, type, peer, comm, stream);
}

NcclResult Nccl::receive(void* data, std::size_t count, c10::ScalarType type, int peer,
                         NcclComm comm, DeviceStream stream) {
  return add_message(false, data, count, type, peer, comm, stream);
}

}  // namespace meshloom::comm::mock
