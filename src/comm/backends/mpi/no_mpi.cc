#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {

Communicator make_mpi_world(const GroupOptions&) {
  throw NotSupported("comm.make_mpi_world",
                     "this build has no MPI, expected -DMESHLOOM_WITH_MPI=ON (Debian: "
                     "libopenmpi-dev)");
}

}  // namespace meshloom::comm
