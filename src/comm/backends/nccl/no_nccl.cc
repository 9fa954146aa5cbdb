#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {

Communicator make_nccl_world(Communicator, int, const GroupOptions&, const NcclOptions&) {
  throw NotSupported("comm.make_nccl_world",
                     "this build has no NCCL, expected -DMESHLOOM_WITH_NCCL=ON "
                     "-DMESHLOOM_WITH_CUDA=ON and a LibTorch with CUDA");
}

}  // namespace meshloom::comm
