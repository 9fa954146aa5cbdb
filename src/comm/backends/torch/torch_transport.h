#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
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
  /// @throws std::exception  the message failed or was aborted.
  virtual void wait() = 0;
  /// Makes a wait end soon, where the process group can. Any thread.
  virtual void abort() noexcept = 0;
};

/// The process group: CPU bytes under tags, at least one byte a message, no more than the receiver
/// asked for. Buffers must live until the message is destroyed. Any thread.
class TorchPort {
 public:
  virtual ~TorchPort();
  virtual std::unique_ptr<TorchMessage> send(int peer, std::byte* data, std::int64_t bytes,
                                             int tag) = 0;
  virtual std::unique_ptr<TorchMessage> receive(int peer, std::byte* data, std::int64_t bytes,
                                                int tag) = 0;
  /// From whoever sends first; null where the process group can't.
  virtual std::unique_ptr<TorchMessage> receive_from_any(std::byte* data, std::int64_t bytes,
                                                         int tag) = 0;
};

/// Runs the calls of one world over a port. A process group can be waited for, but not polled, so
/// every call under way has a thread that waits; threads are kept and reused.
///
/// Every message starts with a frame of fixed size that says what it belongs to, since Gloo ends
/// the process when a message is larger than its receive: payloads that fit travel in the frame,
/// the others are received only after the frames of both sides agreed.
class TorchTransport : public std::enable_shared_from_this<TorchTransport> {
 public:
  /// @param world  0 .. kWorlds - 1; tells worlds over one process group apart.
  TorchTransport(std::unique_ptr<TorchPort> port, int world, int rank);
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

  /// Hears from now on of groups that other ranks abort.
  void open();
  /// Ends everything; the threads end now, or, if one of them calls this, when it returns.
  void close();

  void add_group(const std::shared_ptr<Group>& group);
  void start(const std::shared_ptr<Group>& group, const std::shared_ptr<WorkImpl>& work);
  /// Ends what is pending in `group` and in its children, for good; `tell` its other members.
  void abort(const std::shared_ptr<Group>& group, const std::string& reason, bool tell);
  /// The first peer that holds `work` up.
  [[nodiscard]] std::vector<int> missing(const WorkImpl& work);

  [[nodiscard]] int propose_id() const { return next_id_.load(); }
  void take_id(int id) { next_id_.store(id + 1); }
  static constexpr int kGroups = 1 << 9;
  static constexpr int kWorlds = 1 << 3;
  static constexpr std::int64_t kFrameBytes = 512;

  struct Call;

 private:
  using Frame = std::array<std::byte, kFrameBytes>;
  struct Notice {
    Frame frame{};
    std::unique_ptr<TorchMessage> message;
  };

  void post(Call& call, const Phase& phase);
  [[nodiscard]] int tag_of(Call& call, int peer, bool send);
  void write_frame(const Call& call, const Block& block, Frame& frame) const;
  void take_frame(Call& call, std::size_t index);
  void post_to_self(const std::shared_ptr<Call>& call);
  void work_off();
  void wait_for(const std::shared_ptr<Call>& call);
  void listen();
  [[nodiscard]] int control_tag() const;
  static void finish_part(Call& call);

  std::unique_ptr<TorchPort> port_;
  const int world_;
  const int rank_;               // of the process group
  std::atomic<int> next_id_{2};  // 0 is the control channel, 1 the world

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Call>> queue_;
  std::list<std::weak_ptr<Call>> calls_;
  // Ended badly: the process group may still touch their buffers, for as long as it lives.
  std::vector<std::shared_ptr<Call>> graves_;
  std::map<int, std::weak_ptr<Group>> groups_;
  std::map<int, std::string> early_aborts_;  // groups not known here yet
  std::vector<std::shared_ptr<Notice>> notices_;
  std::shared_ptr<Notice> inbox_;
  std::vector<std::thread> threads_;
  int idle_ = 0;
  bool stop_ = false;
};

struct TorchTransport::Call {
  std::shared_ptr<Group> group;
  std::shared_ptr<WorkImpl> work;
  Schedule schedule;
  struct Open {
    Block block;
    bool send = false;
    int tag = 0;
    std::unique_ptr<Frame> frame;
    std::unique_ptr<TorchMessage> head;
    std::unique_ptr<TorchMessage> body;  // null when the payload is in the frame
  };
  std::mutex mutex;              // opens, against abort
  std::vector<Open> opens;       // of the phase under way, receives first
  std::map<int, int> lanes_out;  // messages to each peer so far
  std::map<int, int> lanes_in;
  bool aborted = false;
  std::atomic<int> waits_for{-1};  // group rank
  std::atomic<int> remaining{1};   // the transport's part, and each message to oneself
};

struct TorchTransport::Group::Half {
  std::shared_ptr<Call> call;
  at::Tensor tensor;
};

}  // namespace meshloom::comm::detail
