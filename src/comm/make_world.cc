#include <fmt/format.h>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {

Communicator make_world(const Environment& environment, const GroupOptions& options) {
  GroupOptions filled = options;
  if (!filled.timeout) filled.timeout = environment.timeout;
  const std::string& backend = environment.backend;
  if (backend == "thread") return make_thread_world(1, filled).front();
  if (backend.empty() || backend == "mpi") {
    if (backend.empty() && !environment.under_mpi) return make_thread_world(1, filled).front();
    return make_mpi_world(filled);
  }
  if (backend == "torch") {
    throw NotSupported("comm.make_world",
                       "backend torch needs a c10d process group: expected make_torch_world, or "
                       "Communicator.from_env in Python");
  }
  if (backend == "nccl") {
    throw NotSupported("comm.make_world",
                       "backend nccl needs a device and a bootstrap: expected make_nccl_world");
  }
  throw InvalidArgument(
      "comm.make_world",
      fmt::format("MESHLOOM_BACKEND is \"{}\", expected thread, mpi, nccl or torch", backend));
}

}  // namespace meshloom::comm
