#pragma once

#include <vector>

#include "meshloom/plan/strategy.h"
#include "plan/balance/model.h"

namespace meshloom::plan::balance {

/// Slots for runs in which a slot's ranks wait for each other, in a pipeline or in lockstep: all
/// units of a slot take about as long, and all slots too, as far as the lengths allow. Tries
/// several numbers of slots and `first`, and takes the one that steps fastest, traffic considered.
[[nodiscard]] std::vector<Slot> level_slots(const PlanProblem& problem, const Model& model,
                                            std::vector<Slot> first);

}  // namespace meshloom::plan::balance
