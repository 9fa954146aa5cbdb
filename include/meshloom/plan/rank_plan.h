#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/slicing.h"
#include "meshloom/plan/step_plan.h"

/// Plain lists out of a plan, for trainers that run it themselves.
namespace meshloom::plan {

/// A unit and its place in the global order.
struct PlacedUnit : Unit {
  int slot = 0;
  int index = 0;  ///< in the slot
};

/// All units in global order: slot by slot.
[[nodiscard]] MESHLOOM_API std::vector<PlacedUnit> placed_units(const StepPlan& plan);

/// The HDP ranks of every sample, by sample id, in ring order.
[[nodiscard]] MESHLOOM_API std::map<std::int64_t, std::vector<int>> sample_ranks(
    const StepPlan& plan);

/// One micro-batch of one HDP rank: a unit, and what the rank holds of it.
struct RankUnit : PlacedUnit {
  int member = 0;  ///< this rank's position in `ranks`
  /// Ends of the whole documents, laid end to end: 0, s0, s0 + s1, ... [documents + 1]
  std::vector<std::int64_t> cu_seqlens;
  /// The same for this rank's share of each document. [documents + 1]
  std::vector<std::int64_t> local_cu_seqlens;
  /// Which tokens of each document these are, in local order. [documents]
  std::vector<std::array<TokenRange, 2>> ranges;
};

/// What one HDP rank runs in one step, in order.
struct RankPlan {
  int rank = 0;
  std::vector<RankUnit> units;
};

/// @throws InvalidArgument  the rank is not on the HDP axis.
/// @throws PlanError        a unit names a sample that is not the step's.
[[nodiscard]] MESHLOOM_API RankPlan rank_plan(const StepPlan& plan, int rank);

}  // namespace meshloom::plan
