#include "comm/backends/nccl/nccl_engine.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>

#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// Between polls of events while calls are under way, and without.
constexpr microseconds kBusyPause{20};
constexpr milliseconds kIdlePause{20};
// Errors, aborts of peers and limits are looked for less often than events.
constexpr milliseconds kErrorPeriod{5};
// A communicator that is no longer needed gets this long to flush before it is aborted.
constexpr std::chrono::seconds kLastWait{2};

bool is_message(const WorkImpl& work) {
  return work.request().operation == Operation::kSendReceive;
}

std::string aborted_text(const NcclLane& lane) {
  return fmt::format("aborted: communicator \"{}\" is gone, it was aborted with another group",
                     lane.name);
}

void end_thread(std::thread& thread) {
  if (!thread.joinable()) return;
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();
  } else {
    thread.join();
  }
}

}  // namespace

const char* name_of(NcclResult result) {
  switch (result) {
    case NcclResult::kSuccess:
      return "success";
    case NcclResult::kUnhandledCudaError:
      return "unhandled CUDA error";
    case NcclResult::kSystemError:
      return "system error";
    case NcclResult::kInternalError:
      return "internal error";
    case NcclResult::kInvalidArgument:
      return "invalid argument";
    case NcclResult::kInvalidUsage:
      return "invalid usage";
    case NcclResult::kRemoteError:
      return "remote error";
    case NcclResult::kInProgress:
      return "in progress";
  }
  return "unknown";
}

NcclApi::~NcclApi() = default;
DeviceApi::~DeviceApi() = default;

NcclEngine::NcclEngine(std::shared_ptr<NcclApi> api, std::shared_ptr<DeviceApi> device,
                       NcclOptions options)
    : api_(std::move(api)), device_(std::move(device)), options_(std::move(options)) {}

void NcclEngine::open() {
  // They hold the engine: the last group may go away on one of them, and a process that ends does
  // not wait for an abort that hangs.
  watcher_ = std::thread([self = shared_from_this()] { self->watch(); });
  digger_ = std::thread([self = shared_from_this()] { self->dig(); });
}

void NcclEngine::close() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  end_thread(watcher_);
  if (messages_) bury(messages_, true);
  std::unique_lock lock(mutex_);
  const bool clean = buried_.wait_for(lock, kLastWait + std::chrono::seconds(1),
                                      [&] { return graves_.empty() && digging_ == 0; });
  stop_digging_ = true;
  buried_.notify_all();
  lock.unlock();
  if (clean) {
    end_thread(digger_);
  } else if (digger_.joinable()) {
    digger_.detach();  // stuck inside NCCL with a dead peer; it holds the engine
  }
}

NcclConfig NcclEngine::config_of(const std::string& name) const {
  NcclConfig config;
  config.name = name;
  const auto found = options_.ctas.find(name);
  const CtaLimits& limits = found == options_.ctas.end() ? options_.default_ctas : found->second;
  config.min_ctas = limits.least;
  config.max_ctas = limits.most;
  return config;
}

void NcclEngine::check(NcclResult result, NcclComm comm, const std::string& what) const {
  if (!is_bad(result)) return;
  const std::string more = api_->last_error(comm);
  throw CommError("comm.nccl",
                  fmt::format("{}: NCCL says {} (code {}){}{}", what, name_of(result),
                              static_cast<int>(result), more.empty() ? "" : ": ", more));
}

void NcclEngine::wait_ready(NcclComm comm, Clock::time_point until, const std::string& what) {
  const auto start = Clock::now();
  while (true) {
    NcclResult state = NcclResult::kInProgress;
    check(api_->async_error(comm, state), comm, what);
    check(state, comm, what);
    if (state == NcclResult::kSuccess) return;
    if (Clock::now() > until) {
      throw Timeout("comm.nccl",
                    fmt::format("{}: not ready within {:.3f} s; some rank did not come", what,
                                std::chrono::duration<double>(Clock::now() - start).count()));
    }
    std::this_thread::sleep_for(kBusyPause);
  }
}

void NcclEngine::adopt(const std::shared_ptr<NcclLane>& lane) {
  lane->stream = device_->make_stream();
  lane->token = at::zeros({1}, at::TensorOptions().dtype(at::kInt).device(device_->device()));
  const std::lock_guard lock(mutex_);
  std::erase_if(lanes_, [](const auto& other) { return other.expired(); });
  lanes_.push_back(lane);
}

int NcclEngine::lanes() const {
  const std::lock_guard lock(mutex_);
  int count = 0;
  for (const auto& weak : lanes_) count += !weak.expired();
  return count;
}

void NcclEngine::make_message_lane(const Communicator& host, milliseconds limit,
                                   const std::string& name) {
  const std::string who = fmt::format("rank {}/{} group \"{}\"", host.rank(), host.size(), name);
  // The id travels with the verdict of the rank that makes it, so that no rank waits in vain.
  auto parcel = at::zeros({static_cast<std::int64_t>(sizeof(NcclId)) + 1}, at::kByte);
  auto* const bytes = parcel.mutable_data_ptr<std::uint8_t>();
  NcclId id;
  NcclResult made = NcclResult::kSuccess;
  if (host.rank() == 0) {
    made = api_->get_unique_id(id);
    bytes[0] = static_cast<std::uint8_t>(made);
    std::memcpy(bytes + 1, id.bytes.data(), sizeof(NcclId));
  }
  CallOptions options;
  options.timeout = limit;
  options.purpose = "bootstrap";
  Communicator to_all = host;
  to_all.broadcast_(parcel, 0, options).wait();
  made = static_cast<NcclResult>(bytes[0]);
  check(made, nullptr, who + ": rank 0 asked for the unique id");
  std::memcpy(id.bytes.data(), bytes + 1, sizeof(NcclId));
  const auto until = Clock::now() + limit;
  const std::string what = who + ": making the communicator";
  const auto lane = std::make_shared<NcclLane>();
  lane->name = name + ".messages";
  try {
    check(api_->init_rank(lane->comm, host.size(), id, host.rank(), config_of(lane->name)),
          lane->comm, what);
    wait_ready(lane->comm, until, what);
  } catch (...) {
    bury(lane, false);
    throw;
  }
  adopt(lane);
  messages_ = lane;
}

std::string NcclEngine::lane_names() const {
  std::vector<std::string> names;
  const std::lock_guard lock(mutex_);
  for (const auto& weak : lanes_) {
    if (const auto lane = weak.lock()) names.push_back(lane->name);
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::shared_ptr<NcclLane> NcclEngine::split_lane(const std::shared_ptr<NcclLane>& parent, int color,
                                                 int key, const std::string& name,
                                                 milliseconds limit, const std::string& who) {
  const auto& from = parent ? parent : messages_;
  const auto until = Clock::now() + limit;
  const std::string what = fmt::format("{}: splitting off \"{}\"", who, name);
  const auto lane = std::make_shared<NcclLane>();
  lane->name = name;
  const std::lock_guard lock(from->mutex);
  if (from->aborted) throw CommError("comm.split", what + ": the group is aborted");
  try {
    check(api_->split(from->comm, color, key, lane->comm, config_of(name)), from->comm, what);
    // NCCL writes the new communicator when the parent has ended the split.
    wait_ready(from->comm, until, what);
    if (color < 0) return nullptr;
    wait_ready(lane->comm, until, what);
  } catch (...) {
    {
      const std::lock_guard keep(mutex_);
      unfinished_.push_back(lane);
    }
    throw;
  }
  adopt(lane);
  return lane;
}

void NcclEngine::add_group(const std::shared_ptr<Group>& group) {
  const std::lock_guard lock(mutex_);
  std::erase_if(groups_, [](const auto& other) { return other.expired(); });
  groups_.push_back(group);
}

void NcclEngine::start(const std::shared_ptr<Group>& group, const std::shared_ptr<WorkImpl>& work) {
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return work->fail("aborted: " + group->reason);
  }
  const auto& lane = is_message(*work) ? messages_ : group->lane;
  try {
    Call call{group, lane, work, nullptr};
    {
      const std::lock_guard lock(lane->mutex);
      if (lane->aborted) {
        return work->fail(
            fmt::format("aborted: communicator \"{}\" is gone, it was aborted with "
                        "another group",
                        lane->name));
      }
      enqueue(*group, *lane, *work);
      call.event = device_->record(lane->stream);
    }
    const std::lock_guard lock(mutex_);
    calls_.push_back(std::move(call));
    changed_.notify_all();
  } catch (const Error& error) {
    work->fail(error.what());
    abort(group, fmt::format("rank {}: {}: {}", group->rank, work->where(), error.what()), true);
  }
}

// The lane's stream takes over where the caller's stream is now.
void NcclEngine::enqueue(Group& group, NcclLane& lane, const WorkImpl& work) {
  const Request& request = work.request();
  const DeviceEvent ready = device_->record(device_->current_stream());
  device_->wait(lane.stream, ready);
  device_->drop_event(ready);
  const auto result =
      enqueue_nccl(*api_, request, group.rank, group.members, lane.comm, lane.stream, lane.token);
  check(result, lane.comm, "enqueueing");
  if (result == NcclResult::kInProgress) wait_ready(lane.comm, work.deadline(), "enqueueing");
  for (const auto* tensor : {&request.input, &request.output}) {
    if (tensor->defined()) device_->keep(*tensor, lane.stream);
  }
  for (const auto* messages : {&request.sends, &request.receives}) {
    for (const Message& message : *messages) device_->keep(message.tensor, lane.stream);
  }
}

void NcclEngine::abort(const std::shared_ptr<Group>& group, const std::string& reason, bool tell) {
  std::vector<std::shared_ptr<Group>> children;
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return;
    group->aborted = true;
    group->reason = reason.empty() ? "no reason given" : reason;
    // Before any caller learns of it: the group may be dropped at once, and its lane retired.
    if (group->lane) group->lane->aborted = true;
    for (const auto& weak : group->children) {
      if (auto child = weak.lock()) children.push_back(std::move(child));
    }
  }
  if (const auto owner = group->owner.lock()) owner->fail_tracked(group->reason);
  // A message that never ends would hold up those of all other groups behind it.
  bool messages_too = false;
  std::vector<Call> ended;
  {
    const std::lock_guard lock(mutex_);
    for (const Call& call : calls_) {
      messages_too = messages_too || (call.group == group && call.lane == messages_);
    }
    if (messages_too) messages_->aborted = true;
    for (auto call = calls_.begin(); call != calls_.end();) {
      const auto next = std::next(call);
      if (call->group == group || call->lane->aborted) {
        ended.push_back(std::move(*call));
        calls_.erase(call);
      }
      call = next;
    }
  }
  for (const Call& call : ended) {
    call.work->fail(call.group == group ? "aborted: " + group->reason
                                        : aborted_text(*call.lane) + ": " + group->reason);
    device_->drop_event(call.event);
  }
  bury(group->lane, false);
  if (messages_too) bury(messages_, false);
  if (tell && group->host) group->host->abort(group->reason);
  for (const auto& child : children) abort(child, reason, tell);
}

// Ending a communicator may block inside NCCL: another thread does it.
void NcclEngine::bury(const std::shared_ptr<NcclLane>& lane, bool flush) {
  if (!lane) return;
  if (!flush) lane->aborted = true;
  const std::lock_guard lock(mutex_);
  graves_.push_back({lane, flush});
  buried_.notify_all();
}

void NcclEngine::retire(const std::shared_ptr<NcclLane>& lane) { bury(lane, true); }

void NcclEngine::dig() {
  std::unique_lock lock(mutex_);
  while (true) {
    buried_.wait(lock, [&] { return stop_digging_ || !graves_.empty(); });
    if (graves_.empty()) return;
    const Grave grave = std::move(graves_.front());
    graves_.pop_front();
    ++digging_;
    lock.unlock();
    end_lane(*grave.lane, grave.flush);
    lock.lock();
    --digging_;
    buried_.notify_all();
  }
}

void NcclEngine::end_lane(NcclLane& lane, bool flush) {
  NcclComm comm = nullptr;
  {
    const std::lock_guard use(lane.mutex);
    comm = std::exchange(lane.comm, nullptr);
  }
  if (comm != nullptr) {
    bool flushed = false;
    if (flush && !lane.aborted && !is_bad(api_->finalize(comm))) {
      const auto until = Clock::now() + kLastWait;
      NcclResult state = NcclResult::kInProgress;
      while (!is_bad(api_->async_error(comm, state)) && state == NcclResult::kInProgress &&
             Clock::now() < until) {
        std::this_thread::sleep_for(milliseconds(1));
      }
      flushed = state == NcclResult::kSuccess;
    }
    if (flushed) {
      api_->destroy(comm);
    } else {
      api_->abort(comm);
    }
  }
  if (lane.stream != nullptr) device_->drop_stream(std::exchange(lane.stream, nullptr));
}

void NcclEngine::watch() {
  auto last = Clock::now();
  while (true) {
    const bool busy = poll_calls();
    if (Clock::now() - last > kErrorPeriod) {
      poll_errors();
      poll_hosts();
      last = Clock::now();
    }
    std::unique_lock lock(mutex_);
    if (stop_) return;
    if (busy) {
      changed_.wait_for(lock, kBusyPause);
    } else {
      changed_.wait_for(lock, kIdlePause, [&] { return stop_ || !calls_.empty(); });
    }
  }
}

// Ends the calls whose events have passed; true while calls are under way.
bool NcclEngine::poll_calls() {
  std::vector<Call> ended;
  std::vector<std::pair<std::shared_ptr<Group>, std::string>> failed;
  bool busy = false;
  {
    const std::lock_guard lock(mutex_);
    for (auto call = calls_.begin(); call != calls_.end();) {
      const auto next = std::next(call);
      try {
        if (device_->done(call->event)) {
          ended.push_back(std::move(*call));
          calls_.erase(call);
        }
      } catch (const Error& error) {
        failed.emplace_back(call->group,
                            fmt::format("rank {}: {}", call->group->rank, error.what()));
      }
      call = next;
    }
    busy = !calls_.empty();
  }
  for (const Call& call : ended) {
    device_->drop_event(call.event);
    // The kernels of an aborted communicator end, too.
    if (call.lane->aborted) {
      call.work->fail(aborted_text(*call.lane));
    } else {
      call.work->complete();
    }
  }
  for (const auto& [group, reason] : failed) abort(group, reason, true);
  return busy;
}

// Asynchronous errors of the communicators with calls under way.
void NcclEngine::poll_errors() {
  std::vector<std::pair<std::shared_ptr<Group>, std::shared_ptr<NcclLane>>> active;
  {
    const std::lock_guard lock(mutex_);
    for (const Call& call : calls_) active.emplace_back(call.group, call.lane);
  }
  for (const auto& [group, lane] : active) {
    std::string text;
    {
      // A lane that is in use is being polled by its user.
      const std::unique_lock lock(lane->mutex, std::try_to_lock);
      if (!lock || lane->comm == nullptr) continue;
      NcclResult state = NcclResult::kSuccess;
      const NcclResult result = api_->async_error(lane->comm, state);
      const NcclResult bad = is_bad(result) ? result : state;
      if (!is_bad(bad)) continue;
      text = fmt::format("rank {}: communicator \"{}\": NCCL says {} (code {}): {}", group->rank,
                         lane->name, name_of(bad), static_cast<int>(bad),
                         api_->last_error(lane->comm));
    }
    abort(group, text, true);
  }
}

// What other ranks aborted.
void NcclEngine::poll_hosts() {
  std::vector<std::shared_ptr<Group>> groups;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : groups_) {
      if (auto group = weak.lock()) groups.push_back(std::move(group));
    }
  }
  for (const auto& group : groups) {
    if (!group->host) continue;
    const std::string reason = group->host->aborted();
    if (!reason.empty()) abort(group, reason, false);
  }
}

}  // namespace meshloom::comm::detail
