#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/parallel/expert_parallel.h"
#include "meshloom/parallel/parameter_state.h"
#include "meshloom/parallel/zero1.h"

namespace meshloom::parallel {

/// All that one rank holds of a stage's parameters: one ZeRO-1 space for what every rank of the HDP
/// axis replicates and, with expert parallelism, another for this rank's experts, whose replicas
/// are the hdp / ep ranks that hold the same ones. Layers ask by the handles of the whole stage and
/// get their own experts' part.
class MESHLOOM_API StageState final : public ParameterState {
 public:
  /// Parameters that are sharded and summed together.
  struct Part {
    model::ParameterTable table;  ///< under the names of the whole, with offsets of its own
    Zero1 zero;
  };

  /// @param table    of the whole stage
  /// @param hdp      communicator over the HDP axis
  /// @param experts  none: every rank holds all experts
  /// @param compute  dtype of values, as in Zero1
  StageState(const model::ParameterTable& table, comm::Communicator hdp,
             const std::optional<ExpertParallel>& experts, at::ScalarType compute,
             at::Device device);
  ~StageState() override;
  StageState(const StageState&) = delete;
  StageState& operator=(const StageState&) = delete;

  [[nodiscard]] model::ParameterSource& source() override;
  [[nodiscard]] model::WeightGradSink& sink() override;
  [[nodiscard]] at::Device device() const override { return device_; }
  [[nodiscard]] at::ScalarType compute() const { return compute_; }
  void zero_gradients() override;
  void reduce() override;
  void gather() override;

  /// One part, or the replicated parameters and this rank's experts. Every parameter of the stage
  /// is in one part of some rank, and every element in one own range of one rank.
  [[nodiscard]] std::vector<Part>& parts() { return parts_; }
  [[nodiscard]] const std::vector<Part>& parts() const { return parts_; }

  /// Takes this rank's parameters out of a flat buffer of the whole stage, in full precision.
  /// @param full  [table.elements], any float dtype
  void assign(const at::Tensor& full);
  /// Gradients summed over all replicas, of the whole stage, on every rank: [table.elements].
  /// Collective.
  [[nodiscard]] at::Tensor whole_gradients();
  /// Values of the whole stage on rank 0 of the axis, [table.elements], elsewhere undefined. A view
  /// of what the rank holds where that is everything. Collective.
  [[nodiscard]] at::Tensor whole_values();

 private:
  class Router;
  /// Which part a handle of the whole stage lies in, and where there.
  [[nodiscard]] std::pair<std::size_t, model::ParameterHandle> locate(
      const model::ParameterHandle& handle) const;
  /// The parameters that member `owner` of the group holds apart from the replicated ones.
  [[nodiscard]] std::int64_t expert_elements(int owner) const;
  void place(at::Tensor& full, const at::Tensor& flat, int owner) const;

  model::ParameterTable table_;
  comm::Communicator hdp_;
  std::optional<ExpertParallel> experts_;
  at::ScalarType compute_;
  at::Device device_;
  std::vector<Part> parts_;
  /// Elements of each part that lie before parameter i of the whole; one entry more at the end.
  std::array<std::vector<std::int64_t>, 2> before_;
  std::unique_ptr<Router> router_;
};

}  // namespace meshloom::parallel
