#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/plan/exchange_choice.h"

namespace meshloom::parallel {

/// What to measure, beside the machine.
struct ExchangeMeasurement {
  plan::ExchangeShape shape;
  at::ScalarType type = at::kFloat;  ///< of queries, keys and values
  at::Device device = at::kCPU;
  int layers = 1;
  int ranks_per_node = 0;  ///< HDP ranks; 0: one node
};

/// Measures the attention kernel, the packing of messages and the links between neighbours, inside
/// a node and between nodes where there are several, all ranks at once as in a run. The slowest
/// rank's figures, so they are the same on all ranks. Takes some tenths of a second. Collective.
/// @throws InvalidArgument  a malformed shape; nothing was sent.
[[nodiscard]] MESHLOOM_API plan::ExchangeModel measure_exchange(comm::Communicator& hdp,
                                                                const ExchangeMeasurement& what);

}  // namespace meshloom::parallel
