#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "meshloom/plan/step_plan.h"

namespace meshloom::plan::detail {

/// Tokens by sample id. Ids are usually 0 .. n-1; then no table is needed.
class TokensById {
 public:
  explicit TokensById(const std::vector<SampleInfo>& samples);
  /// @throws PlanError  the sample is not one of the step's.
  std::int64_t operator()(std::int64_t id) const;

 private:
  const std::vector<SampleInfo>& samples_;
  std::unordered_map<std::int64_t, std::int64_t> table_;
};

/// Time of one unit on each of its ranks, by the plan's cost model.
/// @throws PlanError  a rank is not on the axis, or there is none; names the slot.
[[nodiscard]] double unit_time(const StepPlan& plan, const TokensById& tokens_of, std::size_t slot,
                               const Unit& unit);

/// Ranks of one slot that are through together: a unit's, or under lockstep those of all units and
/// groups that share a rank.
struct Together {
  std::vector<int> ranks;          ///< idle members included
  std::vector<double> rank_times;  ///< of each rank's own unit; zero where it is idle
  double time = 0.0;               ///< the longest of them
};

[[nodiscard]] std::vector<Together> together(const StepPlan& plan, const TokensById& tokens_of,
                                             std::size_t slot);

}  // namespace meshloom::plan::detail
