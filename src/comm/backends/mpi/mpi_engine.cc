#include "comm/backends/mpi/mpi_engine.h"

#include <fmt/format.h>
#include <sys/prctl.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "comm/backends/mpi/mpi_support.h"
#include "comm/internal/group.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kKindBits = 3;
constexpr int kMaxIdBits = 14;
constexpr int kMinWindowBits = 8;
constexpr int kMaxWindowBits = 13;

}  // namespace

void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw CommError("comm.mpi", fmt::format("{} failed: {} (code {})", call, text, code));
}

std::shared_ptr<MpiEngine> MpiEngine::of_process(std::chrono::milliseconds limit) {
  // MPI is one per process and can be started once, so this is the one global of the library. The
  // holder ends MPI when the process exits, whoever still has communicators then.
  struct Holder {
    std::mutex mutex;
    std::shared_ptr<MpiEngine> engine;
    ~Holder() {
      if (engine) engine->shut_down();
    }
  };
  static Holder holder;
  const std::lock_guard lock(holder.mutex);
  if (holder.engine) return holder.engine;
  std::shared_ptr<MpiEngine> engine(new MpiEngine);
  engine->limit_ = limit;
  engine->thread_ = std::thread([raw = engine.get()] { raw->run(); });
  std::unique_lock wait(engine->mutex_);
  engine->changed_.wait(wait, [&] { return engine->ready_; });
  if (engine->start_error_) {
    wait.unlock();
    engine->thread_.join();
    std::rethrow_exception(engine->start_error_);
  }
  holder.engine = engine;
  return engine;
}

MpiEngine::~MpiEngine() = default;

void MpiEngine::shut_down() {
  std::unique_lock lock(mutex_);
  stop_ = true;
  changed_.notify_all();
  // Two limits: one for the peers to say goodbye, one for MPI_Finalize.
  const bool finished =
      changed_.wait_for(lock, 2 * limit_ + std::chrono::seconds(1), [&] { return finished_; });
  lock.unlock();
  if (finished) {
    thread_.join();
  } else {
    thread_.detach();  // stuck inside MPI with a dead peer; the process is ending anyway
  }
}

int MpiEngine::next_world_id() {
  const int id = worlds_.fetch_add(1);
  if (id >= first_split_id()) {
    throw CommError("comm.make_mpi_world",
                    fmt::format("rank {}/{}: {} worlds were made in this process, no tags are left",
                                rank_, size_, id));
  }
  return id;
}

int MpiEngine::propose_split_id() const { return first_split_id() + splits_.load(); }

void MpiEngine::take_split_id(int id) { splits_.store(id + 1 - first_split_id()); }

void MpiEngine::add_group(const std::shared_ptr<MpiGroupState>& group) {
  const std::lock_guard lock(mutex_);
  commands_.push_back({group, nullptr, {}, "", false});
  changed_.notify_all();
}

void MpiEngine::start(const std::shared_ptr<MpiGroupState>& group,
                      const std::shared_ptr<WorkImpl>& work) {
  Call call;
  call.group = group;
  call.work = work;
  call.schedule = make_schedule(work->request(), group->rank,
                                static_cast<int>(group->members.size()), ScheduleLimits{});
  const auto& request = work->request();
  const auto window = static_cast<int>(request.sequence & ((1 << window_bits_) - 1));
  const bool messages = request.operation == Operation::kSendReceive;
  call.tag = (group->id << (kKindBits + window_bits_)) |
             (static_cast<int>(request.operation) << window_bits_) | (messages ? 0 : window);
  {
    const std::lock_guard lock(mutex_);
    if (!stop_) {
      commands_.push_back({group, work, std::move(call), "", false});
      changed_.notify_all();
      return;
    }
  }
  work->fail("aborted: the process is exiting");
}

void MpiEngine::abort(const std::shared_ptr<MpiGroupState>& group, const std::string& reason,
                      bool tell) {
  std::vector<std::shared_ptr<MpiGroupState>> children;
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return;
    group->aborted = true;
    group->reason = reason;
    for (const auto& child : group->children) {
      if (auto state = child.lock()) children.push_back(std::move(state));
    }
  }
  if (const auto owner = group->group.lock()) owner->fail_tracked(reason);
  {
    const std::lock_guard lock(mutex_);
    commands_.push_back({group, nullptr, {}, reason.empty() ? "no reason given" : reason, tell});
    changed_.notify_all();
  }
  for (const auto& child : children) abort(child, reason, tell);
}

std::vector<int> MpiEngine::missing(const WorkImpl& work) {
  std::vector<int> peers;
  // Bounded, so that a report comes even if the progress thread is stuck inside MPI.
  std::unique_lock lock(calls_mutex_, std::chrono::seconds(1));
  if (!lock) return peers;
  for (const Call& call : calls_) {
    if (call.work.get() != &work) continue;
    for (std::size_t i = 0; i < call.requests.size(); ++i) {
      if (call.requests[i] != MPI_REQUEST_NULL) peers.push_back(call.peers[i]);
    }
  }
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  return peers;
}

void MpiEngine::waiting(int change) {
  waiting_.fetch_add(change);
  if (change > 0) changed_.notify_all();
}

void MpiEngine::open_mpi() {
  int flag = 0;
  MPI_Finalized(&flag);
  if (flag != 0) throw CommError("comm.make_mpi_world", "MPI was already finalised");
  MPI_Initialized(&flag);
  if (flag == 0) {
    int provided = 0;
    check_mpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    own_mpi_ = true;
  } else {
    int provided = 0;
    MPI_Query_thread(&provided);
    if (provided < MPI_THREAD_MULTIPLE) {
      throw NotSupported("comm.make_mpi_world",
                         "MPI was initialised outside this library, expected it to be done with "
                         "MPI_THREAD_MULTIPLE, or not at all");
    }
  }
  for (MPI_Comm* comm : {&data_, &control_}) {
    check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, comm), "MPI_Comm_dup");
    check_mpi(MPI_Comm_set_errhandler(*comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  MPI_Comm_rank(data_, &rank_);
  MPI_Comm_size(data_, &size_);
  int* bound = nullptr;
  MPI_Comm_get_attr(data_, MPI_TAG_UB, static_cast<void*>(&bound), &flag);
  const auto largest = static_cast<unsigned>(flag != 0 ? *bound : 32767);  // the standard's minimum
  const int bits = std::bit_width(largest + 1U) - 1;
  window_bits_ = std::clamp(bits - kKindBits - kMaxIdBits, kMinWindowBits, kMaxWindowBits);
  id_bits_ = std::min(kMaxIdBits, bits - kKindBits - window_bits_);
  listen();
}

void MpiEngine::run() {
  // Sleeps of microseconds must not be rounded up to the default slack of 50.
  prctl(PR_SET_TIMERSLACK, 1000UL);
  try {
    open_mpi();
  } catch (...) {
    start_error_ = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    ready_ = true;
    finished_ = start_error_ != nullptr;
    changed_.notify_all();
  }
  if (start_error_) return;
  int idle = 0;
  while (true) {
    bool moved = take_commands();
    moved = poll_calls() || moved;
    moved = poll_control() || moved;
    poll_graves();
    check_departed();
    if (moved) {
      idle = 0;
      continue;
    }
    {
      const std::lock_guard lock(mutex_);
      if (stop_ && commands_.empty()) break;
    }
    rest(++idle);
  }
  leave();
  const std::lock_guard lock(mutex_);
  finished_ = true;
  changed_.notify_all();
}

void MpiEngine::rest(int idle) {
  using std::chrono::microseconds;
  // Nothing under way: only a command or a notice can come, and notices may take their time.
  microseconds pause(20'000);
  if (!calls_.empty()) {
    const bool eager = waiting_.load(std::memory_order_relaxed) > 0;
    if (idle <= (eager ? kEagerYields : kLazyYields)) {
      std::this_thread::yield();
      return;
    }
    const int step = std::min(idle / 8, 6);
    pause = eager ? microseconds(20) : microseconds(std::min(10 << step, 300));
  }
  std::unique_lock lock(mutex_);
  if (commands_.empty() && !stop_) changed_.wait_for(lock, pause);
}

bool MpiEngine::take_commands() {
  std::deque<Command> commands;
  {
    const std::lock_guard lock(mutex_);
    commands.swap(commands_);
  }
  for (Command& command : commands) {
    const auto& group = command.group;
    if (command.work) {
      {
        const std::lock_guard lock(group->mutex);
        if (group->aborted) {  // its work is failed by whoever aborted; make sure of it
          command.work->fail("aborted: " + group->reason);
          continue;
        }
      }
      const std::lock_guard lock(calls_mutex_);
      calls_.push_back(std::move(command.call));
      try {
        post(calls_.back());
      } catch (const std::exception& error) {
        give_up(std::prev(calls_.end()), error);
      }
    } else if (command.reason.empty()) {
      groups_[group->id] = group;
      if (const auto early = early_aborts_.find(group->id); early != early_aborts_.end()) {
        abort(group, early->second, false);
        early_aborts_.erase(early);
      }
    } else {
      failed_ = true;
      const std::lock_guard lock(calls_mutex_);
      for (auto call = calls_.begin(); call != calls_.end();) {
        const auto next = std::next(call);
        if (call->group == group) {
          call->work->fail("aborted: " + command.reason);
          bury(call);
        }
        call = next;
      }
      if (command.tell) {
        for (const int member : group->members) {
          if (member != rank_) send_notice(member, NoticeKind::kAbort, group->id, command.reason);
        }
      }
    }
  }
  return !commands.empty();
}

bool MpiEngine::poll_calls() {
  bool moved = false;
  const std::lock_guard lock(calls_mutex_);
  for (auto call = calls_.begin(); call != calls_.end();) {
    const auto next = std::next(call);
    try {
      const bool progress = advance(*call);
      moved = moved || progress;
      if (call->phase == call->schedule.phases.size()) {
        call->work->complete();
        calls_.erase(call);
      }
    } catch (const std::exception& error) {
      give_up(call, error);
      moved = true;
    }
    call = next;
  }
  return moved;
}

void MpiEngine::give_up(std::list<Call>::iterator call, const std::exception& error) {
  const auto group = call->group;
  const auto work = call->work;
  broken_ = broken_ || dynamic_cast<const CommError*>(&error) != nullptr;
  bury(call);
  work->fail(error.what());
  abort(group, fmt::format("rank {}: {}: {}", group->rank, work->where(), error.what()), true);
}

// Tests what is open, and goes on to the next phase when all has ended.
bool MpiEngine::advance(Call& call) {
  bool moved = false;
  while (call.phase < call.schedule.phases.size()) {
    if (call.open > 0 && !test(call)) return moved;
    moved = true;
    if (call.open > 0) return true;
    const auto& finish = call.schedule.phases[call.phase].finish;
    if (finish) finish();
    ++call.phase;
    call.requests.clear();
    call.peers.clear();
    call.expected.clear();
    post(call);
  }
  return moved;
}

void MpiEngine::post(Call& call) {
  if (call.phase == call.schedule.phases.size()) return;
  const Phase& phase = call.schedule.phases[call.phase];
  // Receives first: what arrives then goes straight to its place.
  for (const Block& block : phase.receives) post_block(call, block, false);
  for (const Block& block : phase.sends) post_block(call, block, true);
}

void MpiEngine::post_block(Call& call, const Block& block, bool send) {
  const int peer = call.group->members[block.peer];
  std::int64_t at = 0;
  do {
    // MPI-3 counts are ints; both sides cut at the same places.
    const auto count = static_cast<int>(std::min(kMessageBytes, block.bytes - at));
    MPI_Request request = MPI_REQUEST_NULL;
    if (send) {
      check_mpi(MPI_Isend(block.data + at, count, MPI_BYTE, peer, call.tag, data_, &request),
                "MPI_Isend");
    } else {
      check_mpi(MPI_Irecv(block.data + at, count, MPI_BYTE, peer, call.tag, data_, &request),
                "MPI_Irecv");
    }
    call.requests.push_back(request);
    call.peers.push_back(block.peer);
    call.expected.push_back(send ? -1 : count);
    ++call.open;
    at += count;
  } while (at < block.bytes);
}

bool MpiEngine::test(Call& call) {
  const int total = static_cast<int>(call.requests.size());
  indices_.resize(call.requests.size());
  statuses_.resize(call.requests.size());
  int ended = 0;
  const int code =
      MPI_Testsome(total, call.requests.data(), &ended, indices_.data(), statuses_.data());
  if (code != MPI_ERR_IN_STATUS) check_mpi(code, "MPI_Testsome");
  if (ended == MPI_UNDEFINED) ended = 0;
  call.open -= ended;
  for (int i = 0; i < ended; ++i) {
    const int index = indices_[i];
    if (code == MPI_ERR_IN_STATUS && statuses_[i].MPI_ERROR == MPI_ERR_TRUNCATE) {
      throw InvalidArgument("comm.mpi", disagreement(call, index, "more"));
    }
    if (code == MPI_ERR_IN_STATUS) check_mpi(statuses_[i].MPI_ERROR, "message");
    if (call.expected[index] < 0) continue;
    int count = 0;
    MPI_Get_count(&statuses_[i], MPI_BYTE, &count);
    if (count != call.expected[index]) {
      throw InvalidArgument("comm.mpi", disagreement(call, index, fmt::format("{}", count)));
    }
  }
  return ended > 0;
}

std::string MpiEngine::disagreement(const Call& call, int index, const std::string& got) {
  return fmt::format("the ranks disagree about the call {}: rank {} sent {} bytes, expected {}",
                     signature(call.work->request()), call.peers[index], got, call.expected[index]);
}

// Requests can't be forgotten while MPI may touch their buffers: receives are cancelled, sends are
// waited for in the background.
void MpiEngine::bury(std::list<Call>::iterator call) {
  graves_.splice(graves_.end(), calls_, call);
  Call& dead = graves_.back();
  for (std::size_t i = 0; i < dead.requests.size(); ++i) {
    if (dead.requests[i] != MPI_REQUEST_NULL && dead.expected[i] >= 0) {
      MPI_Cancel(&dead.requests[i]);
    }
  }
}

void MpiEngine::poll_graves() {
  for (auto call = graves_.begin(); call != graves_.end();) {
    int all = 0;
    MPI_Testall(static_cast<int>(call->requests.size()), call->requests.data(), &all,
                MPI_STATUSES_IGNORE);
    call = all != 0 ? graves_.erase(call) : std::next(call);
  }
}

}  // namespace meshloom::comm::detail
