#include "meshloom/plan/step_time.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "plan/internal/timetable.h"
#include "plan/internal/unit_times.h"

namespace meshloom::plan {
namespace {

/// Forward, input gradients and weight gradients alike.
constexpr double kThird = 1.0 / 3.0;

}  // namespace

double step_time(const StepPlan& plan, const Schedule& schedule) {
  plan.layout.validate();
  const auto slots = plan.slots.size();
  const detail::TokensById tokens_of(plan.samples);
  std::vector<std::vector<detail::Together>> groups;
  std::vector<std::size_t> first{0};  // group of each slot
  for (std::size_t s = 0; s < slots; ++s) {
    groups.push_back(detail::together(plan, tokens_of, s));
    first.push_back(first.back() + groups.back().size());
  }
  const auto pieces = schedule.placement.size();
  const auto hdp = static_cast<std::size_t>(plan.layout.hdp);
  std::vector<double> forward_end(pieces * first.back(), 0.0);
  std::vector<double> backward_end(pieces * first.back(), 0.0);
  std::vector<double> free_at(static_cast<std::size_t>(plan.layout.pp) * hdp, 0.0);
  const double share = kThird / static_cast<double>(pieces);
  double last = 0.0;
  // Every rank's program is a subsequence of this order, so what an action waits for comes before.
  for (const detail::OrderedAction& at :
       detail::global_order(schedule, plan.layout, static_cast<int>(slots))) {
    const auto slot = static_cast<std::size_t>(at.action.slot);
    const auto piece = static_cast<std::size_t>(at.piece);
    double* const stage = free_at.data() + static_cast<std::size_t>(at.stage) * hdp;
    for (std::size_t g = 0; g < groups[slot].size(); ++g) {
      const detail::Together& group = groups[slot][g];
      if (at.action.op == Op::kWeightGradient) {
        for (std::size_t i = 0; i < group.ranks.size(); ++i) {
          double& free = stage[group.ranks[i]];
          free += share * group.rank_times[i];
          last = std::max(last, free);
        }
        continue;
      }
      const bool forward = at.action.op == Op::kForward;
      const std::size_t own = piece * first.back() + first[slot] + g;
      double start = 0.0;
      if (forward && piece > 0) start = forward_end[own - first.back()];
      if (!forward && piece + 1 < pieces) start = backward_end[own + first.back()];
      for (const int rank : group.ranks) start = std::max(start, stage[rank]);
      const double parts = forward || at.action.defer_weight_gradient ? 1.0 : 2.0;
      const double end = start + parts * share * group.time;
      (forward ? forward_end : backward_end)[own] = end;
      for (const int rank : group.ranks) stage[rank] = end;
      last = std::max(last, end);
    }
  }
  return last;
}

double step_time(const StepPlan& plan, const std::string& schedule) {
  return step_time(plan, make_schedule(schedule, plan.layout, static_cast<int>(plan.slots.size())));
}

}  // namespace meshloom::plan
