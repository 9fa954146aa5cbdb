#pragma once

#include <c10/core/Device.h>

#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"

namespace meshloom::parallel {

/// A stage's parameters, gradients and optimizer shards on one rank, as the executor sees them. A
/// step is: zero_gradients, any number of backwards into `sink()`, reduce, an update of the shards
/// by whoever optimises, gather.
class MESHLOOM_API ParameterState {
 public:
  virtual ~ParameterState();

  [[nodiscard]] virtual model::ParameterSource& source() = 0;
  [[nodiscard]] virtual model::WeightGradSink& sink() = 0;
  [[nodiscard]] virtual at::Device device() const = 0;

  virtual void zero_gradients() = 0;
  /// Sums gradients over their replicas, each rank keeping what it updates. Collective.
  virtual void reduce() = 0;
  /// Brings updated parameters to all ranks that compute with them. Collective.
  virtual void gather() = 0;
};

}  // namespace meshloom::parallel
