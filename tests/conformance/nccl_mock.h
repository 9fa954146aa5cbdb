#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/backends/nccl/nccl_api.h"
#include "meshloom/comm/communicator.h"

namespace meshloom::comm::mock {

using detail::DeviceEvent;
using detail::DeviceStream;
using detail::NcclComm;
using detail::NcclConfig;
using detail::NcclId;
using detail::NcclResult;

/// A device whose memory is the host's. Streams are threads that run what they hold in order, so
/// that calls which a real device would hang on hang here too. The current stream is the host.
class Device final : public detail::DeviceApi {
 public:
  struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool stop = false;
    std::thread thread;
    ~Stream();
  };

  ~Device() override;
  [[nodiscard]] at::Device device() const override { return at::kCPU; }
  [[nodiscard]] DeviceStream current_stream() override { return nullptr; }
  [[nodiscard]] DeviceStream make_stream() override;
  void drop_stream(DeviceStream stream) noexcept override;
  [[nodiscard]] DeviceEvent record(DeviceStream stream) override;
  void wait(DeviceStream stream, DeviceEvent event) override;
  [[nodiscard]] bool done(DeviceEvent event) override;
  void drop_event(DeviceEvent event) noexcept override;
  void keep(const at::Tensor&, DeviceStream) override { ++kept; }

  static void push(DeviceStream stream, std::function<void()> what);

  std::atomic<int> kept{0};
  std::atomic<bool> broken{false};  // every event then reports a device error

 private:
  std::mutex mutex_;
  std::map<Stream*, std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<Stream>> dropped_;
};

/// NCCL between the threads of one process, strict where NCCL is: calls run in stream order, one
/// after the other, messages match without tags, an abort is heard of by this rank alone. Shared
/// by all ranks; handles belong to one rank. Faults are injected by the fields.
class Nccl final : public detail::NcclApi {
 public:
  Nccl();
  ~Nccl() override;

  int reported_version = 22809;
  std::atomic<bool> init_hangs{false};
  std::atomic<std::int64_t> abort_takes_ms{0};
  /// By world rank: what its communicators report from now on.
  std::map<int, NcclResult> async_errors;
  /// By name of the call ("all_reduce"): its result on this rank.
  std::map<std::pair<int, std::string>, NcclResult> failures;
  std::mutex faults;

  /// What was called, e.g. 'world.messages: send to 2, 12 Byte' by (rank of the first
  /// communicator).
  [[nodiscard]] std::vector<std::string> log(int rank);
  [[nodiscard]] int count(int rank, const std::string& part);

  int version() override { return reported_version; }
  NcclResult get_unique_id(NcclId& id) override;
  NcclResult init_rank(NcclComm& comm, int size, const NcclId& id, int rank,
                       const NcclConfig& config) override;
  NcclResult split(NcclComm parent, int color, int key, NcclComm& comm,
                   const NcclConfig& config) override;
  NcclResult async_error(NcclComm comm, NcclResult& state) override;
  std::string last_error(NcclComm comm) override { return comm ? "mocked" : ""; }
  NcclResult finalize(NcclComm comm) override;
  NcclResult destroy(NcclComm comm) override;
  NcclResult abort(NcclComm comm) override;
  NcclResult group_start() override;
  NcclResult group_end() override;
  NcclResult all_reduce(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                        ReduceOp op, NcclComm comm, DeviceStream stream) override;
  NcclResult reduce(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                    ReduceOp op, int root, NcclComm comm, DeviceStream stream) override;
  NcclResult broadcast(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                       int root, NcclComm comm, DeviceStream stream) override;
  NcclResult all_gather(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                        NcclComm comm, DeviceStream stream) override;
  NcclResult reduce_scatter(const void* send, void* receive, std::size_t count,
                            c10::ScalarType type, ReduceOp op, NcclComm comm,
                            DeviceStream stream) override;
  NcclResult send(const void* data, std::size_t count, c10::ScalarType type, int peer,
                  NcclComm comm, DeviceStream stream) override;
  NcclResult receive(void* data, std::size_t count, c10::ScalarType type, int peer, NcclComm comm,
                     DeviceStream stream) override;

 private:
  struct World;
  struct Handle;
  struct Step {  // one call in a stream
    Handle* handle = nullptr;
    DeviceStream stream = nullptr;
    std::function<Work(Communicator&)> start;  // collectives
    std::function<void(Work&)> finish;         // may be empty
    bool sends = false;                        // messages
    int peer = 0;
    at::Tensor tensor;
  };

  NcclResult add(const std::string& name, const std::string& what, Step step);
  NcclResult add_message(bool sends, const void* data, std::size_t count, c10::ScalarType type,
                         int peer, NcclComm comm, DeviceStream stream);
  static void run(const std::vector<Step>& steps);
  Handle* make_handle(std::shared_ptr<World> world, const Communicator& comm, int place,
                      const NcclConfig& config);
  void finish_split(World& world, int index);

  static thread_local int depth;
  static thread_local std::vector<Step> group;

  std::mutex mutex_;
  int ids_ = 0;
  std::map<std::string, std::shared_ptr<World>> worlds_;  // by unique id
  std::vector<std::unique_ptr<Handle>> handles_;
  std::map<int, std::vector<std::string>> logs_;
};

}  // namespace meshloom::comm::mock
