#include "meshloom/plan/step_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "meshloom/core/error.h"
#include "meshloom/plan/bounds.h"
#include "meshloom/plan/step_time.h"
#include "plan/internal/unit_times.h"

namespace meshloom::plan {
namespace {

constexpr std::array<std::string_view, 5> kExchangeNames{"local", "ring", "all_gather", "ulysses",
                                                         "ring_ulysses"};
constexpr std::array<std::string_view, 3> kLockstepNames{"none", "ep", "hdp"};

template <class Enum, std::size_t N>
Enum parse_name(std::string_view name, const std::array<std::string_view, N>& names,
                const char* what) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    throw InvalidArgument("plan.step_plan", fmt::format("unknown {} \"{}\"; known: {}", what, name,
                                                        fmt::join(names, ", ")));
  }
  return static_cast<Enum>(found - names.begin());
}

}  // namespace

std::string_view to_string(Exchange exchange) {
  return kExchangeNames.at(static_cast<std::size_t>(exchange));
}

std::string_view to_string(Lockstep lockstep) {
  return kLockstepNames.at(static_cast<std::size_t>(lockstep));
}

Exchange parse_exchange(std::string_view name) {
  return parse_name<Exchange>(name, kExchangeNames, "exchange");
}

Lockstep parse_lockstep(std::string_view name) {
  return parse_name<Lockstep>(name, kLockstepNames, "lockstep");
}

std::int64_t StepPlan::total_tokens() const {
  std::int64_t total = 0;
  for (const SampleInfo& sample : samples) total += sample.tokens;
  return total;
}

std::int64_t StepPlan::total_loss_tokens() const {
  std::int64_t total = 0;
  for (const SampleInfo& sample : samples) total += sample.loss_tokens;
  return total;
}

std::vector<double> rank_finish_times(const StepPlan& plan) {
  plan.layout.validate();
  const detail::TokensById tokens_of(plan.samples);
  std::vector<double> free_at(static_cast<std::size_t>(plan.layout.hdp), 0.0);
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    for (const detail::Together& group : detail::together(plan, tokens_of, s)) {
      double start = 0.0;
      for (const int rank : group.ranks) {
        start = std::max(start, free_at[static_cast<std::size_t>(rank)]);
      }
      for (const int rank : group.ranks) {
        free_at[static_cast<std::size_t>(rank)] = start + group.time;
      }
    }
  }
  return free_at;
}

void predict_(StepPlan& plan) {
  const std::vector<double> finish = rank_finish_times(plan);
  const double makespan = finish.empty() ? 0.0 : *std::max_element(finish.begin(), finish.end());
  double work = 0.0;
  for (const SampleInfo& sample : plan.samples) work += plan.cost.work(sample.tokens);
  const detail::TokensById tokens_of(plan.samples);
  std::int64_t exchange_tokens = 0;
  for (const Slot& slot : plan.slots) {
    for (const Unit& unit : slot.units) {
      if (unit.ranks.size() < 2) continue;
      std::int64_t tokens = 0;
      for (const std::int64_t id : unit.samples) tokens += tokens_of(id);
      exchange_tokens += static_cast<std::int64_t>(unit.ranks.size() - 1) * tokens;
    }
  }
  plan.predicted.makespan = makespan;
  plan.predicted.efficiency = makespan > 0 ? work / (plan.layout.hdp * makespan) : 1.0;
  plan.predicted.exchange_tokens = exchange_tokens;
  plan.predicted.step_time.reset();
  if (plan.layout.pp > 1 || plan.lockstep != Lockstep::kNone) {
    plan.predicted.step_time = step_time(plan);
  }

  PlanProblem problem;
  problem.step = plan.step;
  problem.layout = plan.layout;
  problem.capacity_tokens = plan.capacity_tokens;
  problem.lockstep = plan.lockstep;
  problem.memory = plan.memory;
  problem.cost = plan.cost;
  problem.samples = plan.samples;
  plan.predicted.lower_bound = lower_bound(problem);
}

}  // namespace meshloom::plan
