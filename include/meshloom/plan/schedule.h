#pragma once

#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/plan/program.h"

namespace meshloom::plan {

/// One computation of a pipeline stage: `op` is kForward, kBackward or kWeightGradient.
struct StageAction {
  Op op = Op::kForward;
  int chunk = 0;                       ///< model chunk on this stage
  int slot = 0;                        ///< index in the plan's slots
  bool defer_weight_gradient = false;  ///< kBackward: a kWeightGradient follows later
  friend bool operator==(const StageAction&, const StageAction&) = default;
};

/// Where one piece of the model sits.
struct StageChunk {
  int stage = 0;
  int chunk = 0;
  friend bool operator==(const StageChunk&, const StageChunk&) = default;
};

/// A pipeline schedule as data: each stage's total order of (op, chunk, slot), generated over slot
/// indices alone. A rank runs its subsequence of its stage's order, never re-packed; `compile` adds
/// loads, sends, receives and rendezvous.
struct Schedule {
  std::vector<std::vector<StageAction>> stages;  ///< [pp]
  std::vector<StageChunk> placement;             ///< [pp * chunks]: the model's pieces in order
};

/// The schedule `name` for a layout and a number of slots. With pp = 1 the name is ignored: every
/// slot runs forward, then backward.
/// @throws NotSupported  the schedule is not built; names it.
[[nodiscard]] MESHLOOM_API Schedule make_schedule(const std::string& name, const Layout& layout,
                                                  int slots);

}  // namespace meshloom::plan
