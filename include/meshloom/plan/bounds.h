#pragma once

#include "meshloom/core/export.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::plan {

/// A proven lower bound on the makespan of any plan for the problem's samples, capacity and ranks,
/// in the units of `problem.cost`. Does not assume that a plan exists.
[[nodiscard]] MESHLOOM_API double lower_bound(const PlanProblem& problem);

}  // namespace meshloom::plan
