#pragma once

// The C interface alone: the old C++ bindings would want a library of their own.
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
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

/// One group as the engine sees it. Groups are lists of world ranks; their messages are told apart
/// by tags, so a split needs no MPI call that could block on a dead rank.
struct MpiGroupState {
  int id = 0;
  int rank = 0;
  std::vector<int> members;  // world ranks
  std::weak_ptr<GroupImpl> group;

  std::mutex mutex;
  bool aborted = false;
  std::string reason;
  std::vector<std::weak_ptr<MpiGroupState>> children;
};

/// Owns MPI: the thread inside starts it, makes every MPI call of the process and ends it. Other
/// threads hand in calls. It polls with back-off: while a thread of this process waits it polls
/// eagerly, while nobody waits it leaves the cores to those who compute.
class MpiEngine {
 public:
  /// The engine of this process, started on first use and kept until the process exits.
  /// @throws NotSupported  MPI was initialised by somebody else without MPI_THREAD_MULTIPLE.
  /// @throws CommError     MPI can't be started (any more).
  [[nodiscard]] static std::shared_ptr<MpiEngine> of_process(std::chrono::milliseconds limit);

  ~MpiEngine();
  MpiEngine(const MpiEngine&) = delete;
  MpiEngine& operator=(const MpiEngine&) = delete;

  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }

  /// Ids tell groups apart that share two ranks. Worlds and splits draw from separate ranges.
  [[nodiscard]] int next_world_id();
  [[nodiscard]] int propose_split_id() const;
  void take_split_id(int id);
  [[nodiscard]] int id_limit() const { return 1 << id_bits_; }

  void add_group(const std::shared_ptr<MpiGroupState>& group);
  void start(const std::shared_ptr<MpiGroupState>& group, const std::shared_ptr<WorkImpl>& work);
  /// Ends what is pending in `group` and in its children, now and for good; `tell` its other
  /// members.
  void abort(const std::shared_ptr<MpiGroupState>& group, const std::string& reason, bool tell);
  [[nodiscard]] std::vector<int> missing(const WorkImpl& work);
  /// A thread starts (+1) or stops (-1) waiting.
  void waiting(int change);

 private:
  struct Call {  // a started operation
    std::shared_ptr<MpiGroupState> group;
    std::shared_ptr<WorkImpl> work;
    Schedule schedule;
    std::size_t phase = 0;
    int tag = 0;
    std::vector<MPI_Request> requests;
    std::vector<int> peers;              // group rank, by request
    std::vector<std::int64_t> expected;  // bytes, by request; -1 for sends
    int open = 0;
  };
  struct Command {  // a call to start; without one: a group to abort, or with no reason to add
    std::shared_ptr<MpiGroupState> group;
    std::shared_ptr<WorkImpl> work;
    Call call;
    std::string reason;
    bool tell = false;
  };
  enum class NoticeKind : std::int32_t { kAbort = 1, kGoodbye = 2 };
  struct Outgoing {
    std::vector<char> bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  // Polls without a pause before it starts to sleep, while a thread waits and while none does.
  static constexpr int kEagerYields = 200;
  static constexpr int kLazyYields = 10;

  MpiEngine() = default;
  void shut_down();
  [[nodiscard]] int first_split_id() const { return id_limit() / 8; }

  // The progress thread.
  void run();
  void open_mpi();
  void rest(int idle);
  bool take_commands();
  bool poll_calls();
  bool advance(Call& call);
  void post(Call& call);
  void post_block(Call& call, const Block& block, bool send);
  bool test(Call& call);
  [[nodiscard]] static std::string disagreement(const Call& call, int index,
                                                const std::string& got);
  void give_up(std::list<Call>::iterator call, const std::exception& error);
  void bury(std::list<Call>::iterator call);
  void poll_graves();
  void listen();
  void send_notice(int world_rank, NoticeKind kind, int group, const std::string& text);
  bool poll_control();
  void check_departed();
  void leave();
  void finish_without_free();

  std::thread thread_;
  int rank_ = 0;
  int size_ = 1;
  int id_bits_ = 0;
  int window_bits_ = 0;
  bool own_mpi_ = false;
  std::chrono::milliseconds limit_{0};
  std::atomic<int> worlds_{0};
  std::atomic<int> splits_{0};
  std::atomic<int> waiting_{0};

  std::mutex mutex_;  // what other threads hand in
  std::condition_variable changed_;
  std::deque<Command> commands_;
  bool ready_ = false;
  bool stop_ = false;
  bool finished_ = false;
  std::exception_ptr start_error_;

  std::timed_mutex calls_mutex_;  // calls_, for `missing`
  std::list<Call> calls_;

  // Of the progress thread alone.
  MPI_Comm data_ = MPI_COMM_NULL;
  MPI_Comm control_ = MPI_COMM_NULL;
  std::map<int, std::weak_ptr<MpiGroupState>> groups_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  std::list<Call> graves_;  // ended badly, but MPI may still touch their buffers
  std::vector<char> inbox_;
  MPI_Request inbox_request_ = MPI_REQUEST_NULL;
  std::list<Outgoing> outbox_;
  std::map<int, std::chrono::steady_clock::time_point> departed_;  // by world rank
  std::map<int, std::string> early_aborts_;                        // groups not known here yet
  bool failed_ = false;                                            // a group was aborted
  bool broken_ = false;                                            // MPI itself returned an error
};

}  // namespace meshloom::comm::detail
