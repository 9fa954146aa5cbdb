#pragma once

#include <string>

#include "meshloom/core/export.h"
#include "meshloom/plan/schedule.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// Time of the plan's programs in the units of its cost model: every stage's pieces in the
/// schedule's order, units as soon as their ranks and inputs are there, lockstep groups together. A
/// piece takes its part of the unit's time, a third of that forward, a third for input gradients
/// and a third for weight gradients; transfers between stages take none. This is what the simulator
/// says of the same programs on a cluster where only computation takes time.
/// @throws PlanError  as `compile`.
[[nodiscard]] MESHLOOM_API double step_time(const StepPlan& plan, const Schedule& schedule);
/// With a built-in schedule, as in `make_schedule`.
[[nodiscard]] MESHLOOM_API double step_time(const StepPlan& plan, const std::string& schedule = "");

}  // namespace meshloom::plan
