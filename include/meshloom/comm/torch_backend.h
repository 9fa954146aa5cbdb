#pragma once

#include <c10/util/intrusive_ptr.h>

#include "meshloom/comm/backends.h"
#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace c10d {
class ProcessGroup;
}

namespace meshloom::comm {

/// A world over a torch.distributed process group that carries CPU tensors (gloo, mpi,
/// cpu:gloo,cuda:nccl), for programs that torchrun started. Collective. Only its tagged send, recv
/// and recvAnysource are used, with tags from 2^18 up: others can go on using the group with
/// smaller tags and with torch's collectives. At most eight worlds over one group at a time.
/// Groups that a rank aborts are aborted on the others where the group has recvAnysource (gloo,
/// mpi); otherwise the others find out by their own time limits.
/// @throws InvalidArgument  the group is null.
/// @throws NotSupported     the group carries no CPU tensors (nccl alone).
[[nodiscard]] MESHLOOM_API Communicator make_torch_world(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group, const GroupOptions& options = {});

}  // namespace meshloom::comm
