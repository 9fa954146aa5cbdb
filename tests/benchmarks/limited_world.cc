#include "limited_world.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <string>
#include <thread>
#include <utility>

#include "comm/internal/group.h"

namespace meshloom::benchmarks {
namespace {

using comm::detail::GroupImpl;
using comm::detail::GroupInfo;
using comm::detail::Message;
using comm::detail::Operation;
using comm::detail::WorkImpl;
using Clock = std::chrono::steady_clock;
using WorkPointer = std::shared_ptr<WorkImpl>;

/// Ports, posted messages and the thread that ends calls when their time has come.
class Network {
 public:
  Network(int size, const LinkLimit& limit)
      : size_(static_cast<std::size_t>(size)),
        limit_(limit),
        out_(size_),
        in_(size_),
        lanes_(size_ * size_),
        timer_([this] { run(); }) {}
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;
  ~Network() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    timer_.join();
  }

  void post(int rank, const WorkPointer& work) {
    const auto& request = work->request();
    const auto call = std::make_shared<Call>();
    call->work = work;
    call->missing = request.sends.size() + request.receives.size();
    call->end = Clock::now();
    const std::lock_guard lock(mutex_);
    if (!reason_.empty()) {
      work->fail("aborted: " + reason_);
      return;
    }
    for (const Message& send : request.sends) {
      auto& lane =
          lanes_[static_cast<std::size_t>(rank) * size_ + static_cast<std::size_t>(send.peer)];
      lane.sends.push_back({call, send.tensor});
      match(lane, rank, send.peer);
    }
    for (const Message& receive : request.receives) {
      auto& lane =
          lanes_[static_cast<std::size_t>(receive.peer) * size_ + static_cast<std::size_t>(rank)];
      lane.receives.push_back({call, receive.tensor});
      match(lane, receive.peer, rank);
    }
    if (call->missing == 0) schedule(call);
  }

  void abort(const std::string& reason) {
    const std::lock_guard lock(mutex_);
    if (!reason_.empty()) return;
    reason_ = reason.empty() ? "no reason given" : reason;
    for (Lane& lane : lanes_) {
      for (const auto* halves : {&lane.sends, &lane.receives}) {
        for (const Half& half : *halves) half.call->work->fail("aborted: " + reason_);
      }
      lane = Lane();
    }
  }
  std::string reason() {
    const std::lock_guard lock(mutex_);
    return reason_;
  }

 private:
  struct Call {
    WorkPointer work;
    std::size_t missing = 0;  // messages without their other half
    Clock::time_point end;
  };
  struct Half {
    std::shared_ptr<Call> call;
    at::Tensor tensor;
  };
  struct Lane {
    std::deque<Half> sends;
    std::deque<Half> receives;
  };
  struct Due {
    Clock::time_point time;
    WorkPointer work;
    bool operator>(const Due& other) const { return time > other.time; }
  };

  static Clock::duration span(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }

  /// A message on its way. Ports share their bandwidth evenly among the messages that use them.
  struct Flow {
    std::size_t source;
    std::size_t destination;
    double bytes;  ///< left
    double rate;
    std::shared_ptr<Call> sender;
    std::shared_ptr<Call> receiver;
  };

  void match(Lane& lane, int source, int destination) {
    while (!lane.sends.empty() && !lane.receives.empty()) {
      const Half send = std::move(lane.sends.front());
      const Half receive = std::move(lane.receives.front());
      lane.sends.pop_front();
      lane.receives.pop_front();
      std::memcpy(receive.tensor.mutable_data_ptr(), send.tensor.const_data_ptr(),
                  send.tensor.nbytes());
      advance();
      flows_.push_back({.source = static_cast<std::size_t>(source),
                        .destination = static_cast<std::size_t>(destination),
                        .bytes = static_cast<double>(send.tensor.nbytes()),
                        .rate = 0.0,
                        .sender = send.call,
                        .receiver = receive.call});
      share();
      changed_.notify_all();
    }
  }

  /// Moves all flows to now; those that have arrived end.
  void advance() {
    constexpr double kLeftOver = 0.5;  // of a byte
    const auto now = Clock::now();
    const double elapsed = std::chrono::duration<double>(now - moved_).count();
    moved_ = now;
    bool ended = false;
    for (Flow& flow : flows_) {
      flow.bytes -= flow.rate * elapsed;
      if (flow.bytes > kLeftOver) continue;
      ended = true;
      for (const auto& call : {flow.sender, flow.receiver}) {
        call->end = std::max(call->end, now + span(limit_.latency));
        if (--call->missing == 0) schedule(call);
      }
    }
    if (!ended) return;
    std::erase_if(flows_, [](const Flow& flow) { return flow.bytes <= kLeftOver; });
    share();
  }

  void share() {
    std::fill(out_.begin(), out_.end(), 0);
    std::fill(in_.begin(), in_.end(), 0);
    for (const Flow& flow : flows_) {
      ++out_[flow.source];
      ++in_[flow.destination];
    }
    for (Flow& flow : flows_) {
      flow.rate = limit_.bandwidth / std::max(out_[flow.source], in_[flow.destination]);
    }
  }

  void schedule(const std::shared_ptr<Call>& call) {
    due_.push({call->end, call->work});
    changed_.notify_all();
  }

  void run() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      advance();
      if (!due_.empty() && due_.top().time <= Clock::now()) {
        const WorkPointer work = due_.top().work;
        due_.pop();
        lock.unlock();
        work->complete();
        lock.lock();
        continue;
      }
      if (due_.empty() && flows_.empty()) {
        changed_.wait(lock);
        continue;
      }
      auto next = due_.empty() ? Clock::time_point::max() : due_.top().time;
      for (const Flow& flow : flows_) {
        next = std::min(next, Clock::now() + span(flow.bytes / flow.rate));
      }
      changed_.wait_until(lock, next);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t size_;
  LinkLimit limit_;
  std::vector<int> out_;  // flows that leave each rank
  std::vector<int> in_;
  std::vector<Flow> flows_;
  Clock::time_point moved_ = Clock::now();
  std::vector<Lane> lanes_;
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  std::string reason_;
  bool stop_ = false;
  std::thread timer_;  // last: it uses all others
};

class LimitedGroup final : public GroupImpl {
 public:
  LimitedGroup(GroupInfo info, std::shared_ptr<Network> network)
      : GroupImpl(std::move(info)), network_(std::move(network)) {}

  [[nodiscard]] std::string backend() const override { return "limited"; }
  void start(const WorkPointer& work) override {
    if (work->request().operation != Operation::kSendReceive) {
      work->fail("a limited world moves messages alone");
      return;
    }
    network_->post(info().rank, work);
  }
  void abort(const std::string& reason) noexcept override { network_->abort(reason); }
  [[nodiscard]] std::string abort_reason() override { return network_->reason(); }
  [[nodiscard]] std::vector<int> missing(const WorkImpl& /*work*/) override { return {}; }
  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& /*place*/) override {
    return nullptr;
  }

 private:
  std::shared_ptr<Network> network_;
};

}  // namespace

std::vector<comm::Communicator> make_limited_world(int size, const LinkLimit& limit) {
  const auto network = std::make_shared<Network>(size, limit);
  std::vector<comm::Communicator> world;
  for (int rank = 0; rank < size; ++rank) {
    GroupInfo info;
    info.name = "limited";
    info.rank = rank;
    info.size = size;
    info.timeout = std::chrono::minutes(1);
    info.deterministic = true;
    info.recorder = std::make_shared<comm::FlightRecorder>(64);
    info.groups = std::make_shared<comm::detail::GroupList>();
    world.emplace_back(std::make_shared<LimitedGroup>(std::move(info), network));
  }
  return world;
}

}  // namespace meshloom::benchmarks
