#include "meshloom/plan/strategy.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/plan/verifier.h"
#include "plan/strategies/slot_builder.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

constexpr const char* kProblem = "plan.problem";

/// An id that occurs twice, if any does.
const SampleInfo* find_repeated(const std::vector<SampleInfo>& samples) {
  const auto by_id = [](const SampleInfo* a, const SampleInfo* b) { return a->id < b->id; };
  const auto not_rising = [](const SampleInfo& a, const SampleInfo& b) { return a.id >= b.id; };
  if (std::adjacent_find(samples.begin(), samples.end(), not_rising) == samples.end()) {
    return nullptr;
  }
  std::vector<const SampleInfo*> sorted;
  sorted.reserve(samples.size());
  for (const SampleInfo& sample : samples) sorted.push_back(&sample);
  std::sort(sorted.begin(), sorted.end(), by_id);
  const auto found =
      std::adjacent_find(sorted.begin(), sorted.end(),
                         [](const SampleInfo* a, const SampleInfo* b) { return a->id == b->id; });
  return found == sorted.end() ? nullptr : *found;
}

class FunctionStrategy final : public BalanceStrategy {
 public:
  explicit FunctionStrategy(std::function<std::vector<Slot>(const PlanProblem&)> assign)
      : assign_(std::move(assign)) {}
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    return assign_(problem);
  }

 private:
  std::function<std::vector<Slot>(const PlanProblem&)> assign_;
};

}  // namespace

BalanceStrategy::~BalanceStrategy() = default;

void PlanProblem::validate() const {
  layout.validate();
  cost.validate();
  memory.validate();
  MESHLOOM_CHECK(step >= 0, kProblem, fmt::format("step is {}, expected >= 0", step));
  MESHLOOM_CHECK(
      capacity_tokens >= 1 && capacity_tokens <= kMaxTokens, kProblem,
      fmt::format("capacity_tokens is {}, expected 1 .. {}", capacity_tokens, kMaxTokens));
  MESHLOOM_CHECK(ranks_per_node >= 0, kProblem,
                 fmt::format("ranks_per_node is {}, expected >= 0", ranks_per_node));
  MESHLOOM_CHECK(!samples.empty(), kProblem, "samples is empty, expected at least one");
  const std::int64_t most = memory.unit_capacity(capacity_tokens, layout.hdp, 1.0);
  std::int64_t total = 0;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const SampleInfo& sample = samples[i];
    const auto place = [&] { return fmt::format("samples[{}] (id {})", i, sample.id); };
    MESHLOOM_CHECK(
        sample.tokens >= 1 && sample.tokens <= kMaxTokens, kProblem,
        fmt::format("{}: tokens is {}, expected 1 .. {}", place(), sample.tokens, kMaxTokens));
    MESHLOOM_CHECK(sample.loss_tokens >= 0 && sample.loss_tokens <= sample.tokens, kProblem,
                   fmt::format("{}: loss_tokens is {}, expected 0 .. {} (its tokens)", place(),
                               sample.loss_tokens, sample.tokens));
    MESHLOOM_CHECK(
        sample.tokens <= most, kProblem,
        fmt::format("{}: {} tokens do not fit the whole axis, {} ranks of {} tokens hold {}",
                    place(), sample.tokens, layout.hdp, capacity_tokens, most));
    MESHLOOM_CHECK(!__builtin_add_overflow(total, sample.tokens, &total), kProblem,
                   "samples have more tokens in all than 64 bits count");
  }
  const SampleInfo* repeated = find_repeated(samples);
  MESHLOOM_CHECK(repeated == nullptr, kProblem,
                 fmt::format("samples: id {} occurs more than once", repeated->id));
}

PlanProblem PlanProblem::from_lengths(const std::vector<std::int64_t>& lengths,
                                      const Layout& layout, std::int64_t capacity_tokens) {
  PlanProblem problem;
  problem.layout = layout;
  problem.capacity_tokens = capacity_tokens;
  problem.samples.reserve(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    problem.samples.push_back({.id = static_cast<std::int64_t>(i),
                               .tokens = lengths[i],
                               .loss_tokens = std::max<std::int64_t>(lengths[i] - 1, 0)});
  }
  return problem;
}

std::vector<Slot> into_slots(std::vector<Unit> units, int hdp) {
  SlotBuilder builder(hdp);
  for (std::size_t u = 0; u < units.size(); ++u) {
    const auto refuse = [&](const std::string& what) {
      throw PlanError("plan.into_slots", fmt::format("unit {}: {}", u, what));
    };
    if (units[u].ranks.empty()) refuse("no ranks");
    for (const int rank : units[u].ranks) {
      if (rank < 0 || rank >= hdp) {
        refuse(fmt::format("rank {}, expected 0 .. {}", rank, hdp - 1));
      }
    }
    builder.add(std::move(units[u]));
  }
  return std::move(builder).take();
}

std::shared_ptr<BalanceStrategy> make_strategy(
    std::function<std::vector<Slot>(const PlanProblem&)> assign) {
  return std::make_shared<FunctionStrategy>(std::move(assign));
}

std::shared_ptr<StrategyRegistry> make_strategy_registry() {
  auto registry = std::make_shared<StrategyRegistry>("plan.strategy");
  registry->add("static", make_static);
  registry->add("naive_hdp", make_naive_hdp);
  registry->add("balanced", make_balanced);
  registry->add("bytescale", make_bytescale);
  registry->add("exact", make_exact);
  return registry;
}

ExchangeChooser exchange_chooser(const PlanProblem& problem) {
  std::optional<ExchangeModel> model = problem.exchange;
  if (model) model->ranks_per_node = problem.ranks_per_node;
  return {std::move(model), problem.exchange_rules};
}

StepPlan make_plan(const PlanProblem& problem, const std::string& name,
                   const BalanceStrategy& strategy) {
  problem.validate();
  if (problem.layout.ep > 1 && problem.lockstep == Lockstep::kNone) {
    PlanProblem wider = problem;
    wider.lockstep = Lockstep::kEp;
    return make_plan(wider, name, strategy);
  }
  StepPlan plan;
  plan.step = problem.step;
  plan.strategy = name;
  plan.layout = problem.layout;
  plan.capacity_tokens = problem.capacity_tokens;
  plan.lockstep = problem.lockstep;
  plan.ranks_per_node = problem.ranks_per_node;
  plan.memory = problem.memory;
  plan.cost = problem.cost;
  plan.samples = problem.samples;
  plan.slots = strategy.assign(problem);
  if (problem.exchange || !problem.exchange_rules.empty()) {
    exchange_chooser(problem).apply_(plan.slots, plan.samples);
  }
  predict_(plan);
  verify(plan);
  return plan;
}

StepPlan make_plan(const PlanProblem& problem, const std::string& strategy) {
  return make_plan(problem, strategy, *make_strategy_registry()->create(strategy));
}

}  // namespace meshloom::plan
