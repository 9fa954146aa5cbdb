#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/replicas.h"

namespace meshloom::parallel {

/// The parameters of a table on one rank of a group of replicas, and what ZeRO shards of them [BS
/// 5.1; Rajbhandari et al. 2019]: the optimizer's masters always; with Zero::kGradients the summed
/// gradient, so that a whole buffer is there only between `gradients` and `finish_reduce`; with
/// Zero::kParameters the values, too, which are there between `fetch` and `drop`. A group of one
/// shards nothing. Gradients accumulate in max(fp32, compute dtype).
///
/// Pairs of start_ and finish_ are collective over the group and don't block in between; one of a
/// kind may be under way.
class MESHLOOM_API ShardedSpace {
 public:
  /// @param compute  dtype of values: fp32, bf16, fp64. Masters and gradients are max(fp32, it).
  ShardedSpace(model::ParameterTable table, Replicas replicas, Zero zero, at::ScalarType compute,
               at::Device device);

  [[nodiscard]] const model::ParameterTable& table() const { return table_; }
  [[nodiscard]] Zero zero() const { return zero_; }

  /// What this rank owns of it.
  [[nodiscard]] FlatRange own_range() const;

  /// Master values of the own range, [own_range().size()]. A view of the values where their dtype
  /// is the master's and they are not sharded.
  [[nodiscard]] const at::Tensor& master() const { return master_; }
  /// The own range in compute dtype.
  [[nodiscard]] at::Tensor shard_values() const;
  /// Summed gradient of the own range, after the step's last `finish_reduce`.
  [[nodiscard]] const at::Tensor& shard_gradient() const { return shard_gradient_; }

  /// All values in compute dtype, [elements]. Sharded ones are fetched first. Collective then.
  [[nodiscard]] const at::Tensor& values();
  /// Starts gathering sharded values, unless they are there.
  void fetch();
  /// Lets sharded values go.
  void drop();

  /// Where gradients accumulate, [elements]; zeros at first.
  [[nodiscard]] const at::Tensor& gradients();
  void zero_gradients();
  /// Sums the buffer over the group, each rank keeping its range.
  void start_reduce();
  void finish_reduce();

  /// Own masters, updated, to all ranks that hold their values.
  void start_gather();
  void finish_gather();

  /// What a rank keeps of every element between steps, but for gradients.
  struct Kept {
    at::Tensor tensor;
    bool whole = false;  ///< of all elements; else of the own range
  };
  /// Values where they are not sharded; masters where they are not a view of those. The same kinds
  /// on all ranks.
  [[nodiscard]] std::vector<Kept> kept() const;
  /// Gives the same elements to other parameters, of the same shapes in the same order. Gradients
  /// are undefined then. @throws InvalidArgument  other shapes.
  void rename(model::ParameterTable table);

  /// Takes values and own masters from a full-precision source.
  /// @param full  [elements], any float dtype
  void assign(const at::Tensor& full);

 private:
  [[nodiscard]] bool alone() const { return replicas_.size() == 1; }
  [[nodiscard]] bool shards_values() const { return zero_ == Zero::kParameters; }

  model::ParameterTable table_;
  Replicas replicas_;
  Zero zero_;
  at::TensorOptions value_options_;
  at::TensorOptions master_options_;
  at::Tensor values_;
  at::Tensor gradients_;
  at::Tensor master_;
  at::Tensor shard_gradient_;
  std::optional<ReplicaWork> reducing_;
  std::optional<ReplicaWork> gathering_;
};

}  // namespace meshloom::parallel
