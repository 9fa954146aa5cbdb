#pragma once

#include <c10/util/intrusive_ptr.h>

#include "meshloom/comm/backends.h"
#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace c10d {
class ProcessGroup;
}

namespace meshloom::comm {

/// A world over a torch.distributed process group (Gloo, MPI, or any whose send and recv carry CPU
/// tensors under tags), for programs that torchrun started. Collective. Tags from 2^21 up are used;
/// the group can go on being used by others with smaller ones, and by torch's collectives.
/// `abort` ends this rank's calls; the peers find out by their own time limits.
/// @throws InvalidArgument  the group is null.
[[nodiscard]] MESHLOOM_API Communicator make_torch_world(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group, const GroupOptions& options = {});

}  // namespace meshloom::comm
