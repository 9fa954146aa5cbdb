// Loss on held-out documents.

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "train/internal/trainer_impl.h"

namespace meshloom::train {

double Trainer::Impl::evaluate() {
  const c10::DeviceGuard guard(device_);
  std::string bytes;
  on_rank_0("train.evaluate", [&] {
    detail::StepOrder order;
    order.membership = loader_->held_out(config_.evaluate_tokens);
    if (order.membership.samples.empty()) {
      throw DataError("train.evaluate", "no documents are held out; set data.held_out_fraction");
    }
    plan::PlanProblem problem;
    problem.step = next_step_;
    problem.layout = config_.layout;
    problem.capacity_tokens = config_.capacity_tokens;
    problem.ranks_per_node = detail::hdp_ranks_per_node(placement_);
    if (placement_.zero != parallel::Zero::kOptimizer) problem.lockstep = plan::Lockstep::kHdp;
    problem.cost = cost_fit_.model();
    problem.memory = memory_model();
    problem.samples = order.membership.samples;
    order.plan = plan::make_plan(problem, "balanced");
    bytes = order.to_bytes();
  });
  const detail::StepOrder order =
      detail::StepOrder::from_bytes(detail::broadcast_text(world_, bytes, 0));
  const plan::Program program = plan::compile_rank(order.plan, compile_, world_.rank());
  parallel::ExecutorOptions options;
  options.record_spans = false;
  parallel::Executor evaluator(stages_, placement_, *groups_, options,
                               parallel::make_exchange_factory(exchange_options_));
  const parallel::StepOutcome outcome =
      evaluator.evaluate(order.plan, program, sample_loader(order.membership), *state_);
  double loss = 0.0;
  for (const std::vector<double>& rank : detail::gather_numbers(world_, {outcome.loss_sum})) {
    loss += rank[0];
  }
  return loss / static_cast<double>(std::max<std::int64_t>(1, order.plan.total_loss_tokens()));
}

}  // namespace meshloom::train
