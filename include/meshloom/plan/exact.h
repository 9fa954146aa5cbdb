#pragma once

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::plan {

/// What the exact search found.
struct ExactResult {
  std::vector<Slot> slots;
  double makespan = 0.0;
  bool optimal = false;  ///< false: the limit was reached, `slots` is the best plan until then
  std::int64_t visited = 0;
};

/// Branch and bound over units in the order of their start times, for lockstep `none`, pp = 1.
/// Meant as an oracle for up to some 8 ranks and 12 samples.
/// @param visit_limit  search nodes after which it stops and says so.
[[nodiscard]] MESHLOOM_API ExactResult solve_exact(const PlanProblem& problem,
                                                   std::int64_t visit_limit = 2'000'000);

}  // namespace meshloom::plan
