#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <string>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace meshloom::comm::detail {

/// NCCL's own numbers.
enum class NcclResult : std::uint8_t {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

[[nodiscard]] MESHLOOM_API const char* name_of(NcclResult result);

/// Neither success nor in progress.
[[nodiscard]] constexpr bool is_bad(NcclResult result) {
  return result != NcclResult::kSuccess && result != NcclResult::kInProgress;
}

using NcclComm = void*;
using DeviceStream = void*;
using DeviceEvent = void*;

struct NcclId {
  std::array<char, 128> bytes{};
};

/// What a communicator is made with. All are non-blocking and share nothing with their parents.
struct NcclConfig {
  std::string name;
  int min_ctas = 0;  ///< 0: NCCL decides
  int max_ctas = 0;
};

/// The calls of NCCL that Meshloom makes, so that its logic runs against a mock. Counts are
/// elements of `type`; calls of one communicator come from one thread at a time. Nothing throws.
class MESHLOOM_API NcclApi {
 public:
  virtual ~NcclApi();
  [[nodiscard]] virtual int version() = 0;  ///< 22809 is 2.28.9
  virtual NcclResult get_unique_id(NcclId& id) = 0;
  virtual NcclResult init_rank(NcclComm& comm, int size, const NcclId& id, int rank,
                               const NcclConfig& config) = 0;
  /// A negative colour takes part and gets null. `comm` is written when the parent is no longer in
  /// progress; until then it must stay where it is.
  virtual NcclResult split(NcclComm parent, int color, int key, NcclComm& comm,
                           const NcclConfig& config) = 0;
  virtual NcclResult async_error(NcclComm comm, NcclResult& state) = 0;
  [[nodiscard]] virtual std::string last_error(NcclComm comm) = 0;
  virtual NcclResult finalize(NcclComm comm) = 0;
  virtual NcclResult destroy(NcclComm comm) = 0;
  virtual NcclResult abort(NcclComm comm) = 0;  ///< may block until kernels have left

  virtual NcclResult group_start() = 0;
  virtual NcclResult group_end() = 0;
  virtual NcclResult all_reduce(const void* send, void* receive, std::size_t count,
                                c10::ScalarType type, ReduceOp op, NcclComm comm,
                                DeviceStream stream) = 0;
  virtual NcclResult reduce(const void* send, void* receive, std::size_t count,
                            c10::ScalarType type, ReduceOp op, int root, NcclComm comm,
                            DeviceStream stream) = 0;
  virtual NcclResult broadcast(const void* send, void* receive, std::size_t count,
                               c10::ScalarType type, int root, NcclComm comm,
                               DeviceStream stream) = 0;
  virtual NcclResult all_gather(const void* send, void* receive, std::size_t count,
                                c10::ScalarType type, NcclComm comm, DeviceStream stream) = 0;
  virtual NcclResult reduce_scatter(const void* send, void* receive, std::size_t count,
                                    c10::ScalarType type, ReduceOp op, NcclComm comm,
                                    DeviceStream stream) = 0;
  virtual NcclResult send(const void* data, std::size_t count, c10::ScalarType type, int peer,
                          NcclComm comm, DeviceStream stream) = 0;
  virtual NcclResult receive(void* data, std::size_t count, c10::ScalarType type, int peer,
                             NcclComm comm, DeviceStream stream) = 0;
};

/// Streams and events of one device. Any thread. @throws CommError  the device reports an error.
class MESHLOOM_API DeviceApi {
 public:
  virtual ~DeviceApi();
  [[nodiscard]] virtual at::Device device() const = 0;
  [[nodiscard]] virtual DeviceStream current_stream() = 0;
  [[nodiscard]] virtual DeviceStream make_stream() = 0;
  virtual void drop_stream(DeviceStream stream) noexcept = 0;
  /// An event of its own behind all that `stream` holds now.
  [[nodiscard]] virtual DeviceEvent record(DeviceStream stream) = 0;
  virtual void wait(DeviceStream stream, DeviceEvent event) = 0;  ///< on the device
  [[nodiscard]] virtual bool done(DeviceEvent event) = 0;
  virtual void drop_event(DeviceEvent event) noexcept = 0;
  /// The memory of `tensor` is not reused before `stream` is through with what it holds now.
  virtual void keep(const at::Tensor& tensor, DeviceStream stream) = 0;
};

}  // namespace meshloom::comm::detail
