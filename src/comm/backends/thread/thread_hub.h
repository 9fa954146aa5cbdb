#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/internal/work_impl.h"

namespace meshloom::comm::detail {

/// The meeting place of one group's threads. A collective runs when its last rank has posted it:
/// the posting thread moves the data, and waiting threads take pieces of it. Messages are copied by
/// the thread that posts the second half of a pair. Thread safe.
class ThreadHub : public std::enable_shared_from_this<ThreadHub> {
 public:
  explicit ThreadHub(int size);

  void post_collective(int rank, const std::shared_ptr<WorkImpl>& work);
  void post_exchange(int rank, const std::shared_ptr<WorkImpl>& work);

  /// Ranks that have not posted what `work` of `rank` waits for.
  [[nodiscard]] std::vector<int> missing(int rank, const WorkImpl& work);

  /// The hub of one colour of split number `number`; the first of `size` members makes it.
  [[nodiscard]] std::shared_ptr<ThreadHub> child(std::int64_t number, int color, int size);

  /// Empty while it is usable.
  [[nodiscard]] std::string abort_reason();

  /// Fails everything pending and to come, here and in all children.
  void abort(const std::string& reason);

 private:
  struct Collective {
    std::vector<std::shared_ptr<WorkImpl>> works;  // by rank, null until posted
    int first = 0;                                 // the rank that posted first
    int posted = 0;
  };
  struct Exchange {
    std::shared_ptr<WorkImpl> work;
    std::atomic<int> remaining{0};
  };
  struct Half {
    std::shared_ptr<Exchange> owner;
    at::Tensor tensor;
  };
  struct Lane {  // messages of one (source, destination), in posting order; one side is empty
    std::deque<Half> sends;
    std::deque<Half> receives;
  };
  struct Child {
    std::shared_ptr<ThreadHub> hub;
    int joined = 0;
  };

  Lane& lane(int source, int destination) { return lanes_[source * size_ + destination]; }

  std::mutex mutex_;
  const int size_;
  bool aborted_ = false;
  std::string reason_;
  std::map<std::int64_t, Collective> pending_;  // by sequence
  std::vector<Lane> lanes_;
  std::map<std::pair<std::int64_t, int>, Child> forming_;
  std::vector<std::weak_ptr<ThreadHub>> children_;
};

/// What a complete set of calls disagrees about, or an empty string.
[[nodiscard]] std::string disagreement(const std::vector<std::shared_ptr<WorkImpl>>& works);

/// Moves the data of a collective whose calls (by rank) are all there and agree, then completes
/// them. Waiting threads help with large ones.
void run_collective(std::vector<std::shared_ptr<WorkImpl>> works);

}  // namespace meshloom::comm::detail
