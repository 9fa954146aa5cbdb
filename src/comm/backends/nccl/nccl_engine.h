#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/backends/nccl/nccl_api.h"
#include "comm/internal/group.h"
#include "meshloom/comm/backends.h"

namespace meshloom::comm::detail {

/// A communicator and the stream that all its calls go to. NCCL has no tags: what is on one lane
/// runs in one order, which must be the same on all its ranks.
struct NcclLane {
  std::string name;
  NcclComm comm = nullptr;
  DeviceStream stream = nullptr;
  at::Tensor token;  // one element, for barriers
  std::mutex mutex;  // calls of the communicator
  std::atomic<bool> aborted{false};
};

/// The lanes of one world of one rank: what makes them, watches their calls and ends them. Two
/// threads: one polls events, asynchronous errors and the host groups; one aborts communicators,
/// which may block. Thread safe.
class NcclEngine : public std::enable_shared_from_this<NcclEngine> {
 public:
  struct Group {
    int rank = 0;
    std::vector<int> members;  // ranks of the world
    std::shared_ptr<NcclLane> lane;
    std::optional<Communicator> host;  // of the same ranks; carries aborts
    std::weak_ptr<GroupImpl> owner;
    std::mutex mutex;
    bool aborted = false;
    std::string reason;
    std::vector<std::weak_ptr<Group>> children;
  };

  NcclEngine(std::shared_ptr<NcclApi> api, std::shared_ptr<DeviceApi> device, NcclOptions options);

  void open();
  /// Ends the threads and the communicators; never waits for peers beyond a second.
  void close();

  /// The lane of messages of the whole world, by the unique id. Collective, blocks up to `limit`.
  /// @throws Timeout    some rank did not come.
  /// @throws CommError  NCCL failed.
  void make_message_lane(const Communicator& host, std::chrono::milliseconds limit,
                         const std::string& name);
  /// A lane split from `parent` (null: from the lane of messages); null for a negative colour.
  [[nodiscard]] std::shared_ptr<NcclLane> split_lane(const std::shared_ptr<NcclLane>& parent,
                                                     int color, int key, const std::string& name,
                                                     std::chrono::milliseconds limit,
                                                     const std::string& who);
  [[nodiscard]] int lanes() const;
  [[nodiscard]] std::string lane_names() const;
  /// The lane of a group that is no more.
  void retire(const std::shared_ptr<NcclLane>& lane);

  void add_group(const std::shared_ptr<Group>& group);
  void start(const std::shared_ptr<Group>& group, const std::shared_ptr<WorkImpl>& work);
  void abort(const std::shared_ptr<Group>& group, const std::string& reason, bool tell);

  [[nodiscard]] DeviceApi& device() { return *device_; }
  [[nodiscard]] const NcclOptions& options() const { return options_; }

 private:
  struct Call {
    std::shared_ptr<Group> group;
    std::shared_ptr<NcclLane> lane;
    std::shared_ptr<WorkImpl> work;
    DeviceEvent event = nullptr;
  };
  struct Grave {
    std::shared_ptr<NcclLane> lane;
    bool flush = false;  // let it end its sends; otherwise abort
  };

  [[nodiscard]] NcclConfig config_of(const std::string& name) const;
  void adopt(const std::shared_ptr<NcclLane>& lane);
  /// Until the communicator is usable. @throws Timeout, CommError
  void wait_ready(NcclComm comm, std::chrono::steady_clock::time_point until,
                  const std::string& what);
  void check(NcclResult result, NcclComm comm, const std::string& what) const;
  void enqueue(Group& group, NcclLane& lane, const WorkImpl& work);
  void bury(const std::shared_ptr<NcclLane>& lane, bool flush);
  void end_lane(NcclLane& lane, bool flush);
  void watch();
  bool poll_calls();
  void poll_errors();
  void poll_hosts();
  void dig();

  const std::shared_ptr<NcclApi> api_;
  const std::shared_ptr<DeviceApi> device_;
  const NcclOptions options_;
  std::shared_ptr<NcclLane> messages_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Call> calls_;
  std::vector<std::weak_ptr<Group>> groups_;
  std::vector<std::weak_ptr<NcclLane>> lanes_;
  std::vector<std::shared_ptr<NcclLane>> unfinished_;  // NCCL may still write to these
  bool stop_ = false;
  std::thread watcher_;

  std::condition_variable buried_;
  std::deque<Grave> graves_;
  int digging_ = 0;
  bool stop_digging_ = false;
  std::thread digger_;
};

/// The NCCL calls of one request on `comm`, in a group where they are several. CPU-side only.
/// @param members  world ranks by group rank, for messages, which go to the lane of the world.
/// @returns the first result that is neither success nor in progress.
[[nodiscard]] NcclResult enqueue_nccl(NcclApi& api, const Request& request, int rank,
                                      const std::vector<int>& members, NcclComm comm,
                                      DeviceStream stream, const at::Tensor& token);

/// A world over any NCCL and device; make_nccl_world gives it the real ones.
[[nodiscard]] MESHLOOM_API Communicator make_nccl_world(const std::shared_ptr<NcclApi>& api,
                                                        const std::shared_ptr<DeviceApi>& device,
                                                        Communicator bootstrap,
                                                        const GroupOptions& options,
                                                        const NcclOptions& nccl);

}  // namespace meshloom::comm::detail
