#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/core/registry.h"
#include "meshloom/plan/exchange_choice.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// Everything a plan is a function of. Membership (`samples`) is frozen before balancing.
struct MESHLOOM_API PlanProblem {
  std::int64_t step = 0;
  Layout layout;
  std::int64_t capacity_tokens = 0;
  Lockstep lockstep = Lockstep::kNone;
  MemoryModel memory;
  CostModel cost;
  std::vector<SampleInfo> samples;
  /// HDP ranks a node holds; 0: one node. Units inside a node are preferred.
  int ranks_per_node = 0;
  /// Model and machine as far as exchanges depend on them; none: units keep the strategy's choice,
  /// which is ring. `ranks_per_node` here counts, not the one inside.
  std::optional<ExchangeModel> exchange;
  std::vector<ExchangeRule> exchange_rules;

  /// Most tokens of one sample, and of a rank's capacity: sums and squares stay exact enough.
  static constexpr std::int64_t kMaxTokens = std::int64_t{1} << 40;

  /// A problem from plain lengths: ids 0 .. n-1, every token but the first a target.
  [[nodiscard]] static PlanProblem from_lengths(const std::vector<std::int64_t>& lengths,
                                                const Layout& layout, std::int64_t capacity_tokens);

  /// @throws InvalidArgument  names the field: non-positive capacity, empty or duplicate samples,
  ///   tokens < 1, loss tokens outside 0..tokens, a sample that does not fit the whole axis.
  void validate() const;
};

/// Decides which ranks work together on which samples. Implementations are pure: same problem, same
/// slots, on every rank. They may reorder and cut, never borrow, drop or repeat samples.
class MESHLOOM_API BalanceStrategy {
 public:
  virtual ~BalanceStrategy();
  [[nodiscard]] virtual std::vector<Slot> assign(const PlanProblem& problem) const = 0;
};

using StrategyRegistry = Registry<BalanceStrategy>;

/// A registry with `static`, `naive_hdp` and `balanced` (and what else is built in).
[[nodiscard]] MESHLOOM_API std::shared_ptr<StrategyRegistry> make_strategy_registry();

/// Puts units into slots in the order given: each into the first slot after all slots that its
/// ranks are already in, so that every rank meets its units in that order.
/// @throws PlanError  a unit has no ranks, or one outside 0 .. hdp-1; names the unit.
[[nodiscard]] MESHLOOM_API std::vector<Slot> into_slots(std::vector<Unit> units, int hdp);

/// Wraps a function as a strategy.
[[nodiscard]] MESHLOOM_API std::shared_ptr<BalanceStrategy> make_strategy(
    std::function<std::vector<Slot>(const PlanProblem&)> assign);

/// What `make_plan` chooses exchanges with.
/// @throws InvalidArgument  the problem's exchange model is malformed.
[[nodiscard]] MESHLOOM_API ExchangeChooser exchange_chooser(const PlanProblem& problem);

/// Validates the problem, runs the strategy, chooses the exchange of units that it left at ring,
/// fills the prediction and verifies the result. With ep > 1 a `lockstep` of none becomes ep:
/// dispatch is wider than a unit.
/// @throws InvalidArgument  the problem is malformed.
/// @throws PlanError        the strategy broke a contract; names slot, unit, rank, sample.
[[nodiscard]] MESHLOOM_API StepPlan make_plan(const PlanProblem& problem, const std::string& name,
                                              const BalanceStrategy& strategy);
/// The same with a built-in strategy.
[[nodiscard]] MESHLOOM_API StepPlan make_plan(const PlanProblem& problem,
                                              const std::string& strategy = "balanced");

}  // namespace meshloom::plan
