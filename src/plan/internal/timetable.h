#pragma once

#include <vector>

#include "meshloom/plan/schedule.h"

namespace meshloom::plan::detail {

/// One entry of a stage's order: a computation, or one end of a transfer between stages.
struct StageEvent {
  Op op = Op::kForward;
  int chunk = 0;
  int slot = 0;
  int peer_stage = -1;  ///< kSend and kReceive
  bool gradient = false;
  bool defer_weight_gradient = false;
};

/// Runs the schedule's tables once with nominal times (forward 1, backward 2, or 1 where the weight
/// gradient, 1, is deferred) and puts everything that happens on any stage into one total order: a
/// computation at its start, a transfer, for both of its ends, at the end of what makes it. Each
/// stage gets its part. So receives are posted as early as their sends, both ends of a channel
/// count alike, and whatever subset of slots the ranks run, each runs a subsequence of one global
/// order: unbuffered sends can't deadlock.
/// @returns [pp] events of each stage.
/// @throws PlanError  a table misses, repeats or misplaces a computation, or the stages wait for
///   each other; names stage, chunk and slot.
std::vector<std::vector<StageEvent>> timetable(const Schedule& schedule, const Layout& layout,
                                               int slots);

/// A computation of any stage, and the piece of the model that it runs.
struct OrderedAction {
  int stage = 0;
  int piece = 0;
  StageAction action;
};

/// All stages' computations in that order.
/// @throws PlanError  as `timetable`.
std::vector<OrderedAction> global_order(const Schedule& schedule, const Layout& layout, int slots);

}  // namespace meshloom::plan::detail
