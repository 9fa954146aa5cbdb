#pragma once

#include <chrono>
#include <string>

#include "meshloom/core/export.h"

namespace meshloom {

/// Every environment variable that Meshloom reads, in one place. Read once by `from_process`, then
/// passed by value: nothing else calls getenv.
struct MESHLOOM_API Environment {
  /// MESHLOOM_TIMEOUT_SECONDS: limit of every wait that neither its options nor its group set.
  std::chrono::milliseconds timeout{std::chrono::seconds(600)};
  /// MESHLOOM_LOG: off, error, warning, info or debug.
  std::string log_level = "warning";
  /// MESHLOOM_BACKEND: thread, mpi, nccl or torch; empty lets the launcher's variables decide.
  std::string backend;
  /// MESHLOOM_CPU: baseline, avx2 or avx512 caps the vector kernels; empty takes the best there is.
  std::string cpu;
  /// True when mpirun, or srun with PMI, started this process (OMPI_COMM_WORLD_SIZE, PMI_SIZE,
  /// PMI_RANK or PMIX_RANK is set).
  bool under_mpi = false;

  /// @throws InvalidArgument  a variable does not parse; the message names it.
  [[nodiscard]] static Environment from_process();
};

}  // namespace meshloom
