#pragma once

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/data/loader.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "train/internal/collective.h"

namespace meshloom::train::detail {

/// A step as rank 0 hands it out: membership and plan, as bytes with a hash.
struct StepOrder {
  data::StepMembership membership;
  plan::StepPlan plan;

  [[nodiscard]] std::string to_bytes() const;
  /// @throws PlanError  the hash of what arrived is another.
  [[nodiscard]] static StepOrder from_bytes(const std::string& bytes);
};

/// Rank 0's planner: one step ahead, in the background. One thread calls it.
class StepPlanner {
 public:
  /// @param problem  layout, capacity and the like; samples, cost and memory are filled per step
  StepPlanner(std::shared_ptr<data::Loader> loader, std::shared_ptr<plan::BalanceStrategy> strategy,
              std::string strategy_name, plan::PlanProblem problem, plan::CompileOptions compile);

  /// What units' exchanges are chosen by; before the first step.
  void set_exchanges(std::optional<plan::ExchangeModel> model,
                     std::vector<plan::ExchangeRule> rules) {
    problem_.exchange = std::move(model);
    problem_.exchange_rules = std::move(rules);
  }
  /// Why the units of `plan` use their exchanges; empty where none has two ranks.
  [[nodiscard]] std::string exchange_table(const plan::StepPlan& plan) const {
    return plan::exchange_chooser(problem_).table(plan);
  }

  /// Begins to plan `step`: membership, plan, programs of all ranks, verification.
  void start(std::int64_t step, const CostModel& cost, const MemoryModel& memory);
  [[nodiscard]] bool started() const { return next_.valid(); }

  struct Result {
    std::string bytes;         ///< of a StepOrder
    std::string loader_state;  ///< after this step's membership
    double seconds = 0.0;      ///< that planning took
  };
  /// Waits for what `start` began. @throws whatever planning threw; Timeout
  [[nodiscard]] Result take(std::chrono::milliseconds limit);

 private:
  [[nodiscard]] Result make(std::int64_t step, const CostModel& cost, const MemoryModel& memory);

  std::shared_ptr<data::Loader> loader_;
  std::shared_ptr<plan::BalanceStrategy> strategy_;
  std::string strategy_name_;
  plan::PlanProblem problem_;
  plan::CompileOptions compile_;
  std::future<Result> next_;
};

}  // namespace meshloom::train::detail
