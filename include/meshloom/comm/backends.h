#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/environment.h"
#include "meshloom/core/export.h"

namespace meshloom::comm {

struct GroupOptions {
  std::string name = "world";
  /// Limit of calls that give none; without it the environment's (MESHLOOM_TIMEOUT_SECONDS).
  std::optional<std::chrono::milliseconds> timeout;
  /// Ask for a fixed reduction order (thread and mpi always reduce in rank order).
  bool deterministic = false;
  /// Calls that the flight recorder keeps.
  std::size_t recorded_calls = 1024;
};

/// What any rank of a fake world would pass to split: (colour, key).
using SplitRule = std::function<std::pair<int, int>(int rank, const std::string& name)>;

/// `size` communicators of one process that move data between threads. Hand one to each thread.
[[nodiscard]] MESHLOOM_API std::vector<Communicator> make_thread_world(
    int size, const GroupOptions& options = {});

/// Runs `body(communicator)` on `size` threads and joins them. A rank that throws aborts the world,
/// so that no other rank waits for it; then the first failure (by rank) that is not a mere
/// consequence of such an abort is rethrown. Each thread gets `threads_per_rank` intra-op threads;
/// the caller's own setting is as before when the call returns.
MESHLOOM_API void run_thread_ranks(int size, const std::function<void(Communicator)>& body,
                                   const GroupOptions& options = {}, int threads_per_rank = 1);

/// The process's place under mpirun (or a world of one without it). One progress thread owns MPI.
/// @throws NotSupported  built without MPI.
[[nodiscard]] MESHLOOM_API Communicator make_mpi_world(const GroupOptions& options = {});

/// Rank `rank` of a world of `size` that moves nothing: shapes, order and accounting only. Results
/// are zeros. `split` needs `rule`, since no other rank is there to ask; without it, and with more
/// than one rank, it throws NotSupported.
[[nodiscard]] MESHLOOM_API Communicator make_fake_world(int rank, int size,
                                                        const GroupOptions& options = {},
                                                        SplitRule rule = {});

/// Streaming multiprocessors that one communicator may take from the computation; 0: NCCL decides.
struct CtaLimits {
  int least = 0;
  int most = 0;
};

struct NcclOptions {
  /// Every communicator holds device memory and threads: a split beyond this many throws.
  int max_communicators = 24;
  CtaLimits default_ctas;
  /// By group name; "<world>.messages" is the communicator of send_receive.
  std::map<std::string, CtaLimits> ctas;
};

/// NCCL over CUDA devices, one a rank. `bootstrap` is a world of the same ranks on the host (mpi,
/// torch, thread): it hands round the unique id, and later carries aborts. Collective.
///
/// send_receive of all groups goes over one communicator with a stream of its own; every group has
/// a communicator and a stream for its collectives. NCCL has no tags: the messages of a call must
/// match one call of the peer, and two ranks make their common calls in the same order, whatever
/// the group.
/// @throws NotSupported  built without NCCL, or LibTorch without CUDA; NCCL is older than 2.18; a
///                       fixed reduction order is asked for.
/// @throws Timeout       a rank did not come within the limit of `options`.
[[nodiscard]] MESHLOOM_API Communicator make_nccl_world(Communicator bootstrap, int device,
                                                        const GroupOptions& options = {},
                                                        const NcclOptions& nccl = {});

/// What the launcher's variables say: mpirun (OMPI_COMM_WORLD_SIZE, PMI_SIZE), Slurm with PMI, or a
/// world of one. torchrun's variables need a c10d group: see `meshloom.Communicator.from_env`.
[[nodiscard]] MESHLOOM_API Communicator make_world(const Environment& environment,
                                                   const GroupOptions& options = {});

}  // namespace meshloom::comm
