#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
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

/// NCCL over CUDA devices; `bootstrap` broadcasts the unique id and gathers host facts.
/// @throws NotSupported  built without NCCL, or LibTorch without CUDA.
[[nodiscard]] MESHLOOM_API Communicator make_nccl_world(Communicator bootstrap, int device,
                                                        const GroupOptions& options = {});

/// What the launcher's variables say: mpirun (OMPI_COMM_WORLD_SIZE, PMI_SIZE), Slurm with PMI, or a
/// world of one. torchrun's variables need a c10d group: see `meshloom.Communicator.from_env`.
[[nodiscard]] MESHLOOM_API Communicator make_world(const Environment& environment,
                                                   const GroupOptions& options = {});

}  // namespace meshloom::comm
