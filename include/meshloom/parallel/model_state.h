#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/parameter_state.h"
#include "meshloom/parallel/sharded_space.h"

namespace meshloom::parallel {

/// All that one rank holds of a model's parameters, in the parts of its placement. Stages ask by
/// the handles of their own tables and get what this rank holds: its experts, or rows of a fused
/// weight that lie in two parts put together. Sums over replicas start while backward still runs,
/// part by part, in one order on all ranks; with Zero::kParameters the next layer is gathered while
/// one computes.
class MESHLOOM_API ModelState final : public ParameterState {
 public:
  struct Part {
    PlacedPart place;
    ShardedSpace space;
  };

  /// Values are zero. Collective where groups have to agree; nothing is sent.
  /// @param compute  dtype of values, as in ShardedSpace
  ModelState(ModelPlacement placement, Groups& groups, at::ScalarType compute, at::Device device);
  ~ModelState() override;
  ModelState(const ModelState&) = delete;
  ModelState& operator=(const ModelState&) = delete;

  [[nodiscard]] model::ParameterSource& source(int chunk) override;
  [[nodiscard]] model::WeightGradSink& sink(int chunk) override;
  [[nodiscard]] at::Device device() const override { return device_; }
  [[nodiscard]] at::ScalarType compute() const override { return compute_; }
  /// As parameters lie now.
  [[nodiscard]] const ModelPlacement& placement() const { return placement_; }
  [[nodiscard]] const std::vector<ExpertMap>& experts() const override {
    return placement_.experts;
  }
  void begin_pass(int chunk, Pass pass, bool last) override;
  void end_pass(int chunk) override;
  void zero_gradients() override;
  void reduce() override;
  void gather() override;

  [[nodiscard]] std::vector<Part>& parts() { return parts_; }
  [[nodiscard]] const std::vector<Part>& parts() const { return parts_; }

  /// Fills every part.
  /// @param fill  writes values of a part's table, [table.elements], in the master's dtype
  void assign(
      const std::function<void(const model::ParameterTable& table, at::Tensor& values)>& fill);
  /// Experts go where `next` has them, between steps: values, masters and `beside` travel straight
  /// from owner to owner, one of them and one layer at a time, so that a rank holds no more besides
  /// than its experts of a layer. An expert that keeps its place sends nothing. Traffic is
  /// accounted under `experts`. Gradients are undefined then. Collective over the world, the same
  /// `next` on all ranks.
  /// @param next    of each decoder layer, the same numbers on members
  /// @param beside  of each part what is kept for every element of its own range, in the master's
  ///   dtype, e.g. optimizer moments: [parts][any][own_range().size()]; the same number everywhere
  /// @throws InvalidArgument  other numbers; nothing has moved.
  /// @throws CommError, Timeout  the state is undefined.
  void move_experts(const std::vector<ExpertMap>& next,
                    const std::vector<std::vector<at::Tensor>>& beside);
  /// The same for a state that is assigned or read anew afterwards: nothing travels, moved experts
  /// have undefined values.
  void place_experts(const std::vector<ExpertMap>& next);

  /// The reduced gradients of the whole model, in the flat order of its table, on every rank.
  /// Collective over the world.
  [[nodiscard]] at::Tensor whole_gradients();
  /// Values of the whole model in compute dtype on world rank 0, elsewhere undefined. Collective.
  [[nodiscard]] at::Tensor whole_values();

 private:
  class Chunk;
  [[nodiscard]] at::Tensor collect(const std::function<at::Tensor(const ShardedSpace&)>& shard,
                                   bool everywhere);
  /// A layer's gradients are complete: starts the sums that may start.
  void layer_done(Chunk& chunk, std::int64_t layer);
  void finish_flushes(std::size_t keep);
  /// Moves sums and gatherings on that are under way.
  void advance();
  void check_experts(const std::vector<ExpertMap>& next) const;
  void make_chunks();

  ModelPlacement placement_;
  comm::Communicator world_;
  at::ScalarType compute_;
  at::Device device_;
  std::vector<Part> parts_;
  std::vector<Replicas> replicas_;  ///< those that the parts are shared by, each once
  std::vector<std::unique_ptr<Chunk>> chunks_;
  /// Parts that are summed once a step, in their order; how many of them are ready and started.
  std::vector<std::size_t> summed_once_;
  std::vector<bool> ready_;
  std::size_t started_ = 0;
  std::vector<std::size_t> flushing_;  ///< parts whose sum of a micro-batch is under way
};

}  // namespace meshloom::parallel
