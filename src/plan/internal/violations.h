#pragma once

#include <vector>

#include "meshloom/plan/verifier.h"

namespace meshloom::plan::detail {

/// Throws the PlanError that `verify` promises, if there is any violation.
void refuse_if_any(const StepPlan& plan, const std::vector<Violation>& violations);

}  // namespace meshloom::plan::detail
