#include "meshloom/plan/bounds.h"

#include <algorithm>
#include <cmath>

namespace meshloom::plan {

double lower_bound(const PlanProblem& problem) {
  const CostModel& cost = problem.cost;
  const int hdp = problem.layout.hdp;
  double total_work = 0.0;
  double total_tokens = 0.0;
  double slowest_sample = 0.0;
  for (const SampleInfo& sample : problem.samples) {
    const double work = cost.work(sample.tokens);
    total_work += work;
    total_tokens += static_cast<double>(sample.tokens);
    // Time on D ranks is (work - exchange * tokens) / D + exchange * tokens + fixed: monotone in D.
    slowest_sample = std::max(slowest_sample, std::min(cost.unit_time(work, sample.tokens, 1),
                                                       cost.unit_time(work, sample.tokens, hdp)));
  }
  // A unit on D ranks holds at most unit_capacity tokens and costs `fixed` on each of the D.
  const double most =
      static_cast<double>(problem.capacity_tokens) / problem.memory.resident_fraction(1.0);
  const double rank_slots = most > 0 ? std::ceil(total_tokens / most * (1 - 1e-9)) : 0.0;
  return std::max(slowest_sample, (total_work + cost.fixed * rank_slots) / hdp);
}

}  // namespace meshloom::plan
