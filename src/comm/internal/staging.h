#pragma once

#include <functional>

#include "comm/internal/request.h"
#include "meshloom/core/export.h"

namespace meshloom::comm::detail {

/// A request on device tensors, for a backend that moves host memory.
struct Staged {
  Request host;                   ///< the same call on host tensors of its own
  at::Tensor output;              ///< all_gather and the like: the result on the device
  std::function<void()> deliver;  ///< copies what came in to the device; run once, after the end
};

/// Copies what the call reads to the host, which waits for the device's current stream.
[[nodiscard]] MESHLOOM_API Staged stage_through_host(const Request& request);

}  // namespace meshloom::comm::detail
