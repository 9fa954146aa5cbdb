#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/internal/schedule.h"
#include "comm/internal/work_impl.h"

namespace meshloom::comm::detail {

/// One started message of the process group behind a torch world.
class TorchMessage {
 public:
  virtual ~TorchMessage();
  /// @throws std::exception  the message failed or `limit` ran out.
  virtual void wait(std::chrono::milliseconds limit) = 0;
  /// Makes a wait return or throw soon, where the process group can.
  virtual void abort() noexcept = 0;
};

/// The process group: CPU bytes under tags. `bytes` of zero are allowed; buffers live on until the
/// message is destroyed.
class TorchPort {
 public:
  virtual ~TorchPort();
  virtual std::unique_ptr<TorchMessage> send(int peer, std::byte* data, std::int64_t bytes,
                                             int tag) = 0;
  virtual std::unique_ptr<TorchMessage> receive(int peer, std::byte* data, std::int64_t bytes,
                                                int tag) = 0;
};

/// Runs calls over a port. A process group can only be waited for, not polled, so every call under
/// way has a thread that waits; threads are kept and reused.
class TorchTransport {
 public:
  explicit TorchTransport(std::unique_ptr<TorchPort> port) : port_(std::move(port)) {}
  ~TorchTransport();

  struct Group {
    int id = 0;
    int rank = 0;
    std::vector<int> members;  // ranks of the process group
    std::weak_ptr<GroupImpl> owner;
    std::mutex mutex;
    bool aborted = false;
    std::string reason;
    std::vector<std::weak_ptr<Group>> children;
    std::map<int, std::int64_t> sent;      // messages of send_receive so far, by peer
    std::map<int, std::int64_t> received;  // likewise
    struct Half;
    std::deque<Half> self_sends;  // messages to oneself that wait for the other side
    std::deque<Half> self_receives;
  };

  void start(const std::shared_ptr<Group>& group, const std::shared_ptr<WorkImpl>& work);
  void abort(const std::shared_ptr<Group>& group, const std::string& reason);
  [[nodiscard]] std::vector<int> missing(const WorkImpl& work);

  [[nodiscard]] int propose_id() const { return next_id_.load(); }
  void take_id(int id) { next_id_.store(id + 1); }
  static constexpr int kGroups = 1 << 10;

  struct Call {
    std::shared_ptr<Group> group;
    std::shared_ptr<WorkImpl> work;
    Schedule schedule;
    std::mutex mutex;  // messages, against abort
    struct Open {
      int peer = 0;
      std::unique_ptr<TorchMessage> message;
    };
    std::vector<Open> messages;    // of the phase under way, receives first
    std::map<int, int> lanes_out;  // messages to each peer so far
    std::map<int, int> lanes_in;
    bool aborted = false;
    std::atomic<int> waits_for{-1};
    std::atomic<int> remaining{1};  // the transport's part, and each message to oneself
  };

 private:
  void post(Call& call, const Phase& phase);
  [[nodiscard]] int tag_of(Call& call, int peer, bool send);
  void post_to_self(const std::shared_ptr<Call>& call);
  void work_off();
  void wait_for(const std::shared_ptr<Call>& call);
  static void finish_part(Call& call);

  std::unique_ptr<TorchPort> port_;
  std::atomic<int> next_id_{1};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Call>> queue_;
  std::list<std::weak_ptr<Call>> calls_;
  std::vector<std::thread> threads_;
  int idle_ = 0;
  bool stop_ = false;
};

struct TorchTransport::Group::Half {
  std::shared_ptr<Call> call;
  at::Tensor tensor;
};

}  // namespace meshloom::comm::detail
