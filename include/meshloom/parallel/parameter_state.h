#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/expert_parallel.h"

namespace meshloom::parallel {

/// Which way a micro-batch runs through a chunk's layers.
enum class Pass : std::uint8_t { kForward, kBackward, kWeightGradient };

/// All of a rank's parameters, gradients and optimizer shards as the executor sees them. A step is:
/// zero_gradients, passes, reduce, an update of the shards by whoever optimises, gather. Sharded
/// parameters and gradients make collective calls inside passes, of the same passes on all ranks
/// that share them.
class MESHLOOM_API ParameterState {
 public:
  virtual ~ParameterState();

  /// @param chunk  model chunk of this rank
  [[nodiscard]] virtual model::ParameterSource& source(int chunk) = 0;
  [[nodiscard]] virtual model::WeightGradSink& sink(int chunk) = 0;
  [[nodiscard]] virtual at::Device device() const = 0;
  /// Dtype of values and of activations between stages.
  [[nodiscard]] virtual at::ScalarType compute() const = 0;
  /// Where the routed experts of each decoder layer are, [layers].
  [[nodiscard]] virtual const std::vector<ExpertMap>& experts() const = 0;

  /// Brackets one micro-batch's run through a chunk.
  /// @param last  the step's last pass that leaves weight gradients in this chunk: sums over
  ///   replicas may start as layers are done
  virtual void begin_pass(int chunk, Pass pass, bool last) = 0;
  virtual void end_pass(int chunk) = 0;

  virtual void zero_gradients() = 0;
  /// Sums gradients over their replicas, each rank keeping what it updates. Collective.
  virtual void reduce() = 0;
  /// Brings updated parameters to all ranks that compute with them. Collective.
  virtual void gather() = 0;
};

}  // namespace meshloom::parallel
