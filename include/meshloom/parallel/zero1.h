#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/parameter_state.h"

namespace meshloom::parallel {

/// Half-open range of the flat parameter space, in elements.
struct FlatRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t size() const { return end - begin; }
};

/// ZeRO-1 over one group of replicas [BS 5.1], the HDP axis or those who hold the same experts:
/// parameters and gradients are replicated, the optimizer's masters and moments are sharded. Owns
/// the flat buffers of one rank.
///
/// A step is: zero_gradients, any number of backwards into `parameters()`, reduce (collective),
/// an update of `master()` by whoever optimises, gather (collective).
class MESHLOOM_API Zero1 final : public ParameterState {
 public:
  /// @param compute  dtype of values: fp32, bf16, fp64. Masters and gradients are max(fp32, it).
  Zero1(const model::ParameterTable& table, comm::Communicator group, at::ScalarType compute,
        at::Device device);

  [[nodiscard]] model::FlatParameters& parameters() { return parameters_; }
  [[nodiscard]] model::ParameterSource& source() override { return parameters_; }
  [[nodiscard]] model::WeightGradSink& sink() override { return parameters_; }
  [[nodiscard]] at::Device device() const override { return values().device(); }
  [[nodiscard]] const at::Tensor& values() const { return parameters_.values(); }
  [[nodiscard]] const at::Tensor& gradients() const { return parameters_.gradients(); }

  /// Rank r's range; sizes differ by at most one.
  [[nodiscard]] FlatRange range(int rank) const;
  [[nodiscard]] FlatRange own_range() const { return range(group_.rank()); }

  /// Master values of the own range, [own_range().size()]. A view of `values()` where compute
  /// dtype is the master's.
  [[nodiscard]] const at::Tensor& master() const { return master_; }
  /// Summed gradient of the own range after `reduce`.
  [[nodiscard]] const at::Tensor& shard_gradient() const { return shard_gradient_; }

  void zero_gradients() override;
  /// Sums gradients over the group, each rank keeping its range. Collective.
  void reduce() override;
  /// Sums gradients over the group into `gradients()` on every rank. Collective.
  void reduce_to_all();
  /// Own masters to compute dtype, then to all ranks. Collective.
  void gather() override;
  /// After writing `values()` from outside (initialisation, loading): takes the own masters from a
  /// full-precision source.
  /// @param full  [elements], any float dtype
  void assign(const at::Tensor& full);

 private:
  comm::Communicator group_;
  std::int64_t elements_;
  std::vector<std::int64_t> rows_;  ///< elements of each rank's range
  model::FlatParameters parameters_;
  at::Tensor master_;
  at::Tensor shard_gradient_;
};

}  // namespace meshloom::parallel
