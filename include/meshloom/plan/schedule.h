#pragma once

#include <span>
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
/// loads, sends, receives and rendezvous. A table of one's own is one of these, too.
struct Schedule {
  std::vector<std::vector<StageAction>> stages;  ///< [pp]
  std::vector<StageChunk> placement;             ///< [pp * chunks]: the model's pieces in order
};

/// "1f1b", "interleaved_1f1b" [Narayanan et al. 2021], "zb_h1" (zero bubble with the memory of
/// 1F1B [Qi et al. 2023]) and "zb_v" (two chunks a stage in a V [Qi et al. 2024]).
[[nodiscard]] MESHLOOM_API std::vector<std::string> schedule_names();

/// The schedule `name` for a layout and any number of slots. With pp = 1 every slot runs forward,
/// then backward, whatever the name. An empty name is "1f1b", or "interleaved_1f1b" where the
/// layout has several chunks.
/// @throws NotSupported     unknown name; lists the known ones.
/// @throws InvalidArgument  the schedule does not go with the layout's chunks.
[[nodiscard]] MESHLOOM_API Schedule make_schedule(const std::string& name, const Layout& layout,
                                                  int slots);

/// Decoder layers of each of `pieces` pieces: floor(v L / n) to floor((v + 1) L / n).
[[nodiscard]] MESHLOOM_API std::vector<int> even_split(int layers, int pieces);

/// Decoder layers of each of `pieces` pieces, at least one each, so that the heaviest piece is as
/// light as it can be, and the others as level as that allows.
/// @param layers  work of each layer
/// @param first   work of the first piece beside its layers (embedding), `last` of the last (head)
/// @throws InvalidArgument  fewer layers than pieces.
[[nodiscard]] MESHLOOM_API std::vector<int> level_split(std::span<const double> layers,
                                                        double first, double last, int pieces);

/// Refuses a table that can't be carried out: pieces without a place, computations missing,
/// repeated or out of order, stages that wait for each other.
/// @throws PlanError  names stage, chunk and slot.
MESHLOOM_API void check_schedule(const Schedule& schedule, const Layout& layout, int slots);

}  // namespace meshloom::plan
