#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/internal/request.h"
#include "comm/internal/work_impl.h"
#include "meshloom/comm/backends.h"
#include "meshloom/comm/flight_recorder.h"
#include "meshloom/comm/traffic.h"

namespace meshloom::comm::detail {

class GroupImpl;

/// The groups of one rank, over a world and all that was split from it.
class GroupList {
 public:
  void add(const std::shared_ptr<GroupImpl>& group);
  [[nodiscard]] std::vector<std::shared_ptr<GroupImpl>> groups() const;  // in order of making

 private:
  mutable std::mutex mutex_;
  std::vector<std::weak_ptr<GroupImpl>> groups_;
};

/// What every group of every backend carries.
struct GroupInfo {
  std::string name;
  int rank = 0;
  int size = 1;
  std::chrono::milliseconds timeout{0};
  bool deterministic = false;
  // Of this rank, shared with groups split from this one.
  std::shared_ptr<FlightRecorder> recorder;
  std::shared_ptr<GroupList> groups;
};

/// Checks the sizes and fills the limit from options, then environment.
/// @throws InvalidArgument  rank outside [0, size), or size below 1.
[[nodiscard]] GroupInfo make_info(const GroupOptions& options, int rank, int size);

/// A group split from `parent`: place and name are new, everything else is inherited.
[[nodiscard]] GroupInfo child_info(const GroupInfo& parent, const std::string& name, int rank,
                                   int size);

/// One group as one rank sees it. `Communicator` validates, accounts and records; a backend moves
/// the data. Backends implement the pure functions only.
class MESHLOOM_API GroupImpl : public std::enable_shared_from_this<GroupImpl> {
 public:
  explicit GroupImpl(GroupInfo info) : info_(std::move(info)) {}
  virtual ~GroupImpl();
  GroupImpl(const GroupImpl&) = delete;
  GroupImpl& operator=(const GroupImpl&) = delete;

  [[nodiscard]] const GroupInfo& info() const { return info_; }
  [[nodiscard]] virtual std::string backend() const = 0;
  [[nodiscard]] virtual at::Device device() const { return at::kCPU; }

  /// Starts a call and returns; ends `work` now or later from any thread. Never throws for
  /// transport failures (it fails the work instead). On an aborted group it fails the work.
  virtual void start(const std::shared_ptr<WorkImpl>& work) = 0;

  /// Ends every pending and future call, here and in groups split from this one; does not wait.
  virtual void abort(const std::string& reason) noexcept = 0;

  /// Why it was aborted; empty while it is usable.
  [[nodiscard]] virtual std::string abort_reason() = 0;

  /// Peers that `work` still waits for, where known.
  [[nodiscard]] virtual std::vector<int> missing(const WorkImpl& work) = 0;

  struct SplitPlace {
    std::vector<int> members;  // ranks of this group, in the new order
    int rank = 0;              // own place in them
    int color = 0;
    std::int64_t number = 0;  // how many splits this group saw before; equal on all ranks
    std::int32_t token = 0;   // the largest split_token over all ranks of this group
    std::string name;
  };
  /// The group of `place.members`; every rank of this group calls it, those with a negative colour
  /// with nullopt (they get null). Does not block.
  [[nodiscard]] virtual std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) = 0;

  /// What a rank says in a split; the default gathers it from all ranks.
  struct SplitVote {
    int color = 0;
    int key = 0;
    std::int32_t token = 0;
  };
  [[nodiscard]] virtual std::vector<SplitVote> gather_votes(int color, int key,
                                                            const std::string& name);
  [[nodiscard]] virtual std::int32_t split_token() { return 0; }

  /// A thread starts (+1) or stops (-1) waiting for a call of this group.
  virtual void waiting(int /*change*/) {}

  /// Remembers a started call for `pending_report`.
  void track(const std::shared_ptr<WorkImpl>& work);
  [[nodiscard]] std::string pending_report();
  /// The peers that `work` waits for, by rank of this group and, where it is not the world, of the
  /// world: "1 (rank 3 of the world)". Empty where they are not known.
  [[nodiscard]] std::string missing_peers(const WorkImpl& work);
  /// Fails every pending call that was tracked.
  void fail_tracked(const std::string& reason);

  // Kept by Communicator; one thread of a rank at a time calls a group.
  const std::shared_ptr<Account> account = std::make_shared<Account>();
  std::vector<int> ranks_of_world;  // by group rank; empty: those of the world itself
  std::int64_t collectives = 0;
  std::int64_t exchanges = 0;
  std::int64_t splits = 0;

 private:
  [[nodiscard]] std::vector<std::shared_ptr<WorkImpl>> tracked();  // those that are pending

  GroupInfo info_;
  std::mutex tracked_mutex_;
  std::deque<std::weak_ptr<WorkImpl>> tracked_;  // pending calls, oldest first, and some ended ones
  std::size_t tracked_limit_ = 64;
};

}  // namespace meshloom::comm::detail
