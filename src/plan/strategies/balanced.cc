#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "meshloom/plan/exact.h"
#include "plan/balance/fill.h"
#include "plan/balance/levels.h"
#include "plan/balance/model.h"
#include "plan/balance/search.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

/// Steps this small are also searched exhaustively, as far as some milliseconds go.
constexpr std::size_t kFewSamples = 12;
constexpr int kFewRanks = 8;
constexpr std::int64_t kVisits = 30'000;
/// What a shorter makespan has to gain to be worth more traffic.
constexpr double kWorthwhile = 0.01;
/// A makespan this far above the bound is compared with a greedy one: where long units of many
/// ranks fill the step (offload makes them), whoever takes the least loaded ranks may fit better.
constexpr double kLate = 0.03;

double makespan_of(const PlanProblem& problem, const std::vector<Slot>& slots) {
  StepPlan plan;
  plan.layout = problem.layout;
  plan.lockstep = problem.lockstep;
  plan.cost = problem.cost;
  plan.samples = problem.samples;
  plan.slots = slots;
  const auto finish = rank_finish_times(plan);
  return *std::max_element(finish.begin(), finish.end());
}

class Balanced final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    balance::Model model(problem);
    const balance::Schedule schedule = balance::search(model);
    auto slots = balance::to_slots(problem, model, schedule.pieces);
    if (problem.layout.pp > 1 || problem.lockstep != Lockstep::kNone) {
      return balance::level_slots(problem, model, std::move(slots));
    }
    double least = schedule.makespan;
    const auto offer = [&](std::vector<Slot> other, double makespan) {
      if (makespan >= least * (1.0 - kWorthwhile)) return;
      least = makespan;
      slots = std::move(other);
    };
    const bool small = problem.samples.size() <= kFewSamples && problem.layout.hdp <= kFewRanks;
    if (small && least > model.bound * (1.0 + kWorthwhile)) {
      ExactResult best = solve_exact(problem, kVisits);
      offer(std::move(best.slots), best.makespan);
    }
    if (least > model.bound * (1.0 + kLate)) {
      auto other = make_bytescale()->assign(problem);
      const double makespan = makespan_of(problem, other);
      offer(std::move(other), makespan);
    }
    return slots;
  }
};

}  // namespace

std::shared_ptr<BalanceStrategy> make_balanced() { return std::make_shared<Balanced>(); }

}  // namespace meshloom::plan
