// NCCL and CUDA themselves. The functions come from the copy of NCCL that torch has loaded: two
// copies in one process would each start their own threads and buffers.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <nccl.h>

#include <cstring>

#include "comm/backends/nccl/nccl_engine.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {
namespace {

static_assert(sizeof(ncclUniqueId) == sizeof(NcclId));
static_assert(static_cast<int>(ncclInProgress) == static_cast<int>(NcclResult::kInProgress));

ncclComm_t raw(NcclComm comm) { return static_cast<ncclComm_t>(comm); }
ncclComm_t* place_of(NcclComm& comm) { return reinterpret_cast<ncclComm_t*>(&comm); }
cudaStream_t raw_stream(DeviceStream stream) { return static_cast<cudaStream_t>(stream); }
NcclResult result_of(ncclResult_t result) { return static_cast<NcclResult>(result); }

ncclDataType_t type_of(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Double:
      return ncclDouble;
    case c10::ScalarType::Float:
      return ncclFloat;
    case c10::ScalarType::BFloat16:
      return ncclBfloat16;
    case c10::ScalarType::Half:
      return ncclHalf;
    case c10::ScalarType::Long:
      return ncclInt64;
    case c10::ScalarType::Int:
      return ncclInt32;
    default:
      return ncclUint8;
  }
}

ncclRedOp_t op_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return ncclSum;
    case ReduceOp::kMax:
      return ncclMax;
    case ReduceOp::kMin:
      return ncclMin;
  }
  return ncclSum;
}

class NcclLibrary final : public NcclApi {
 public:
  NcclLibrary() {
    // Already in the process where torch was built with NCCL; then nothing is loaded.
    handle_ = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (handle_ == nullptr) handle_ = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
      throw NotSupported("comm.make_nccl_world",
                         fmt::format("libnccl.so.2 can't be loaded: {}", dlerror()));
    }
    find(get_version_, "ncclGetVersion");
    find(get_unique_id_, "ncclGetUniqueId");
    find(init_rank_, "ncclCommInitRankConfig");
    find(split_, "ncclCommSplit");
    find(async_error_, "ncclCommGetAsyncError");
    find(last_error_, "ncclGetLastError");
    find(finalize_, "ncclCommFinalize");
    find(destroy_, "ncclCommDestroy");
    find(abort_, "ncclCommAbort");
    find(group_start_, "ncclGroupStart");
    find(group_end_, "ncclGroupEnd");
    find(all_reduce_, "ncclAllReduce");
    find(reduce_, "ncclReduce");
    find(broadcast_, "ncclBroadcast");
    find(all_gather_, "ncclAllGather");
    find(reduce_scatter_, "ncclReduceScatter");
    find(send_, "ncclSend");
    find(receive_, "ncclRecv");
  }
  // Never closed: NCCL's threads may still run when the last communicator has gone.

  int version() override {
    int version = 0;
    return get_version_(&version) == ncclSuccess ? version : 0;
  }
  NcclResult get_unique_id(NcclId& id) override {
    return result_of(get_unique_id_(reinterpret_cast<ncclUniqueId*>(id.bytes.data())));
  }
  NcclResult init_rank(NcclComm& comm, int size, const NcclId& id, int rank,
                       const NcclConfig& config) override {
    ncclUniqueId raw_id;
    std::memcpy(&raw_id, id.bytes.data(), sizeof(raw_id));
    auto raw_config = make_config(config);
    return result_of(init_rank_(place_of(comm), size, raw_id, rank, &raw_config));
  }
  NcclResult split(NcclComm parent, int color, int key, NcclComm& comm,
                   const NcclConfig& config) override {
    auto raw_config = make_config(config);
    return result_of(split_(raw(parent), color < 0 ? NCCL_SPLIT_NOCOLOR : color, key,
                            place_of(comm), &raw_config));
  }
  NcclResult async_error(NcclComm comm, NcclResult& state) override {
    ncclResult_t raw_state = ncclSuccess;
    const auto result = async_error_(raw(comm), &raw_state);
    state = result_of(raw_state);
    return result_of(result);
  }
  std::string last_error(NcclComm comm) override {
    const char* text = last_error_(raw(comm));
    return text != nullptr ? text : "";
  }
  NcclResult finalize(NcclComm comm) override { return result_of(finalize_(raw(comm))); }
  NcclResult destroy(NcclComm comm) override { return result_of(destroy_(raw(comm))); }
  NcclResult abort(NcclComm comm) override { return result_of(abort_(raw(comm))); }
  NcclResult group_start() override { return result_of(group_start_()); }
  NcclResult group_end() override { return result_of(group_end_()); }
  NcclResult all_reduce(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                        ReduceOp op, NcclComm comm, DeviceStream stream) override {
    return result_of(
        all_reduce_(send, receive, count, type_of(type), op_of(op), raw(comm), raw_stream(stream)));
  }
  NcclResult reduce(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                    ReduceOp op, int root, NcclComm comm, DeviceStream stream) override {
    return result_of(reduce_(send, receive, count, type_of(type), op_of(op), root, raw(comm),
                             raw_stream(stream)));
  }
  NcclResult broadcast(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                       int root, NcclComm comm, DeviceStream stream) override {
    return result_of(
        broadcast_(send, receive, count, type_of(type), root, raw(comm), raw_stream(stream)));
  }
  NcclResult all_gather(const void* send, void* receive, std::size_t count, c10::ScalarType type,
                        NcclComm comm, DeviceStream stream) override {
    return result_of(
        all_gather_(send, receive, count, type_of(type), raw(comm), raw_stream(stream)));
  }
  NcclResult reduce_scatter(const void* send, void* receive, std::size_t count,
                            c10::ScalarType type, ReduceOp op, NcclComm comm,
                            DeviceStream stream) override {
    return result_of(reduce_scatter_(send, receive, count, type_of(type), op_of(op), raw(comm),
                                     raw_stream(stream)));
  }
  NcclResult send(const void* data, std::size_t count, c10::ScalarType type, int peer,
                  NcclComm comm, DeviceStream stream) override {
    return result_of(send_(data, count, type_of(type), peer, raw(comm), raw_stream(stream)));
  }
  NcclResult receive(void* data, std::size_t count, c10::ScalarType type, int peer, NcclComm comm,
                     DeviceStream stream) override {
    return result_of(receive_(data, count, type_of(type), peer, raw(comm), raw_stream(stream)));
  }

 private:
  template <class Function>
  void find(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (function == nullptr) {
      throw NotSupported("comm.make_nccl_world",
                         fmt::format("libnccl.so.2 has no {}, expected NCCL 2.18 or newer", name));
    }
  }

  static ncclConfig_t make_config(const NcclConfig& config) {
    ncclConfig_t result = NCCL_CONFIG_INITIALIZER;
    result.blocking = 0;
    result.splitShare = 0;  // groups are used at the same time
    if (config.min_ctas > 0) result.minCTAs = config.min_ctas;
    if (config.max_ctas > 0) result.maxCTAs = config.max_ctas;
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
    result.commName = config.name.c_str();  // NCCL copies it
#endif
    return result;
  }

  void* handle_ = nullptr;
  decltype(ncclGetVersion)* get_version_ = nullptr;
  decltype(ncclGetUniqueId)* get_unique_id_ = nullptr;
  decltype(ncclCommInitRankConfig)* init_rank_ = nullptr;
  decltype(ncclCommSplit)* split_ = nullptr;
  decltype(ncclCommGetAsyncError)* async_error_ = nullptr;
  decltype(ncclGetLastError)* last_error_ = nullptr;
  decltype(ncclCommFinalize)* finalize_ = nullptr;
  decltype(ncclCommDestroy)* destroy_ = nullptr;
  decltype(ncclCommAbort)* abort_ = nullptr;
  decltype(ncclGroupStart)* group_start_ = nullptr;
  decltype(ncclGroupEnd)* group_end_ = nullptr;
  decltype(ncclAllReduce)* all_reduce_ = nullptr;
  decltype(ncclReduce)* reduce_ = nullptr;
  decltype(ncclBroadcast)* broadcast_ = nullptr;
  decltype(ncclAllGather)* all_gather_ = nullptr;
  decltype(ncclReduceScatter)* reduce_scatter_ = nullptr;
  decltype(ncclSend)* send_ = nullptr;
  decltype(ncclRecv)* receive_ = nullptr;
};

class CudaDevice final : public DeviceApi {
 public:
  explicit CudaDevice(int index) : index_(static_cast<c10::DeviceIndex>(index)) {}

  at::Device device() const override { return {at::kCUDA, index_}; }
  DeviceStream current_stream() override {
    return c10::cuda::getCurrentCUDAStream(index_).stream();
  }
  DeviceStream make_stream() override {
    const c10::cuda::CUDAGuard guard(index_);
    int least = 0;
    int greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    cudaStream_t stream = nullptr;
    // Transfers first: computation that waits for them is worth nothing.
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
          "cudaStreamCreateWithPriority");
    return stream;
  }
  void drop_stream(DeviceStream stream) noexcept override {
    (void)cudaStreamDestroy(raw_stream(stream));
  }
  DeviceEvent record(DeviceStream stream) override {
    const c10::cuda::CUDAGuard guard(index_);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    check(cudaEventRecord(event, raw_stream(stream)), "cudaEventRecord");
    return event;
  }
  void wait(DeviceStream stream, DeviceEvent event) override {
    const c10::cuda::CUDAGuard guard(index_);
    check(cudaStreamWaitEvent(raw_stream(stream), static_cast<cudaEvent_t>(event), 0),
          "cudaStreamWaitEvent");
  }
  bool done(DeviceEvent event) override {
    const auto result = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (result == cudaErrorNotReady) {
      (void)cudaGetLastError();  // not an error that others should see
      return false;
    }
    check(result, "cudaEventQuery");
    return true;
  }
  void drop_event(DeviceEvent event) noexcept override {
    (void)cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
  void keep(const at::Tensor& tensor, DeviceStream stream) override {
    if (!tensor.has_storage() || tensor.nbytes() == 0) return;
    c10::cuda::CUDACachingAllocator::recordStream(
        tensor.storage().data_ptr(), c10::cuda::getStreamFromExternal(raw_stream(stream), index_));
  }

 private:
  void check(cudaError_t result, const char* call) const {
    if (result == cudaSuccess) return;
    throw CommError("comm.nccl",
                    fmt::format("device {}: {} failed: {} (code {})", static_cast<int>(index_),
                                call, cudaGetErrorString(result), static_cast<int>(result)));
  }

  c10::DeviceIndex index_;
};

}  // namespace
}  // namespace detail

Communicator make_nccl_world(Communicator bootstrap, int device, const GroupOptions& options,
                             const NcclOptions& nccl) {
  const int devices = c10::cuda::device_count();
  if (device < 0 || device >= devices) {
    throw InvalidArgument("comm.make_nccl_world",
                          fmt::format("rank {}/{}: device is {}, this process sees {} CUDA devices",
                                      bootstrap.rank(), bootstrap.size(), device, devices));
  }
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  return detail::make_nccl_world(std::make_shared<detail::NcclLibrary>(),
                                 std::make_shared<detail::CudaDevice>(device), std::move(bootstrap),
                                 options, nccl);
}

}  // namespace meshloom::comm
