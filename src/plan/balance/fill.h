#pragma once

#include <span>
#include <vector>

#include "plan/balance/model.h"
#include "plan/balance/placement.h"

namespace meshloom::plan::balance {

/// A unit before it has a slot.
struct Piece {
  std::vector<int> ranks;
  std::vector<int> items;
};

/// Puts `singles` (item indices, largest first) into the gaps that `placement` leaves and packs
/// them into bins of at most `capacity` tokens; `consolidate` spends time on needing few bins.
/// Returns all units in a global order: each rank's units appear in the order in which it runs
/// them.
[[nodiscard]] std::vector<Piece> fill(const Model& model, std::span<const Job> jobs,
                                      const Placement& placement, std::span<const int> singles,
                                      double target, bool consolidate);

/// Packs items into bins of at most `capacity` tokens, longest first, each into the fullest bin
/// that takes it.
[[nodiscard]] std::vector<std::vector<int>> pack(const Model& model, std::span<const int> items);

/// Finish time of the last rank when pieces run in order as soon as all their ranks are free.
[[nodiscard]] double makespan(const Model& model, std::span<const Piece> pieces);

/// Gives every piece the earliest slot after those of its ranks' earlier pieces.
[[nodiscard]] std::vector<Slot> to_slots(const PlanProblem& problem, const Model& model,
                                         std::span<const Piece> pieces);

}  // namespace meshloom::plan::balance
