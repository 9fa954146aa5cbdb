#pragma once

#include <vector>

#include "meshloom/comm/communicator.h"

namespace meshloom::benchmarks {

/// Every rank's port, in and out apart: `bandwidth` is shared evenly by the messages that use one,
/// and each arrives `latency` after its last byte left.
struct LinkLimit {
  double bandwidth = 0.0;  ///< bytes per second
  double latency = 0.0;    ///< seconds
};

/// Ranks as threads whose grouped messages take the time of a slow network while nobody computes
/// for them. A message begins when both sides have posted it. Only send_receive moves data; other
/// calls fail. Hand one communicator to each thread.
std::vector<comm::Communicator> make_limited_world(int size, const LinkLimit& limit);

}  // namespace meshloom::benchmarks
