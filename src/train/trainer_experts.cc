// Expert placement of the trainer: load metrics, re-plans, moves.

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <utility>

#include "meshloom/core/error.h"
#include "train/internal/trainer_impl.h"

namespace meshloom::train {

void Trainer::Impl::watch_experts() {
  const ExpertsSection& experts = config_.parallel.experts;
  if (experts.replan_every == 0) return;
  if (model_.moe.experts == 0 || config_.layout.ep == 1) {
    throw InvalidArgument(
        "train.trainer",
        fmt::format("parallel.experts.replan_every is {}, but {}; give 0, or a layout with ep > 1",
                    experts.replan_every,
                    model_.moe.experts == 0
                        ? fmt::format("the {} model has no experts", model_.model_type)
                        : fmt::format("layout {} has all experts on every rank",
                                      config_.layout.to_string())));
  }
  // Expert-parallel groups are neighbours, and begin where nodes do.
  const int node = placement_.ranks_per_node;
  const int ranks = config_.layout.ep * config_.layout.tp;
  const bool spans = node > 0 && node % config_.layout.tp == 0 && ranks % node == 0;
  expert_loads_.emplace(model_, spans ? ranks / node : 1, experts.least_gain);
}

void Trainer::Impl::load_metrics(const detail::ExpertCounts& counts, StepMetrics& metrics) {
  const detail::ExpertImbalance load = detail::expert_imbalance(model_, state_->experts(), counts);
  if (load.layers == 0) return;
  metrics.extra["expert_imbalance"] = load.experts;
  metrics.extra["expert_imbalance_worst"] = load.experts_worst;
  if (config_.layout.ep > 1) {
    metrics.extra["expert_rank_imbalance"] = load.members;
    metrics.extra["expert_rank_imbalance_worst"] = load.members_worst;
  }
  if (expert_loads_) expert_loads_->add(counts);
}

void Trainer::Impl::replan_experts(StepMetrics& metrics) {
  if (!expert_loads_ || expert_loads_->empty()) return;
  if ((next_step_ + 1) % config_.parallel.experts.replan_every != 0) return;
  place("experts");
  const Clock::time_point begin = Clock::now();
  const detail::ExpertLoads::Decision decision = expert_loads_->decide(state_->experts());
  if (decision.moved > 0) {
    std::vector<std::vector<at::Tensor>> moments;
    for (const AdamW& optimizer : optimizers_) {
      moments.push_back({optimizer.exp_avg(), optimizer.exp_avg_sq()});
    }
    state_->move_experts(decision.maps, moments);
    settle_optimizers();
  }
  metrics.extra["experts_moved"] = static_cast<double>(decision.moved);
  metrics.extra["expert_rank_imbalance_before"] = decision.before;
  metrics.extra["expert_rank_imbalance_planned"] = decision.after;
  metrics.extra["experts_seconds"] = std::chrono::duration<double>(Clock::now() - begin).count();
}

void Trainer::Impl::settle_optimizers() {
  for (std::size_t i = 0; i < optimizers_.size(); ++i) {
    optimizers_[i].settle(state_->parts()[i].space.table(), settings_);
  }
}

}  // namespace meshloom::train
