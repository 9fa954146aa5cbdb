#include "meshloom/plan/bounds.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace meshloom::plan {
namespace {

/// Comparisons of sums of times lean towards the smaller bound by this part: rounding must never
/// lift a bound above an optimum.
constexpr double kRounding = 1e-12;
/// Halvings of the interval in which the bound lies.
constexpr int kHalvings = 48;

/// A sample whose degree depends on the makespan.
struct Critical {
  double work = 0.0;
  double tokens = 0.0;
  int least = 1;  ///< fewest ranks that hold it, everything offloaded that can be
};

/// Fewest ranks >= sample.least on which a unit that holds the sample ends within `limit`.
/// Callers make sure that `hdp` ranks do.
int degree_within(const CostModel& cost, const Critical& sample, double limit, int hdp) {
  const double transfer = cost.exchange * sample.tokens;
  const double left = limit - cost.fixed - transfer;
  if (left <= 0.0) return hdp;
  const double needed = (sample.work - transfer) / left * (1.0 - kRounding);
  return std::clamp(static_cast<int>(std::min<double>(std::ceil(needed), hdp)), sample.least, hdp);
}

}  // namespace

// Proof. Let a plan have makespan M. (1) A unit that holds sample i lasts at least as long as if it
// held i alone, so its degree D satisfies time_i(D) <= M, and memory's D >= least_i. Time over D is
// monotone ((w - x t) / D + x t + f), hence D >= D_i(M), the smallest such degree. (2) A unit of D
// ranks keeps them busy for sum w + D f + x (D - 1) sum t; sample i's part of that, w + x (D - 1)
// t, is at least w + x (D_i(M) - 1) t. (3) It holds at most D times the tokens that one rank holds,
// so the sum of degrees over all units is at least ceil(tokens / that), each costing f. With A(M)
// the sum of (2) and (3), the ranks' time gives A(M) <= hdp M. A falls as M grows, so every
// makespan is at least the smallest T with A(T) <= hdp T and time_i(D) <= T for some D, for every
// i.
double lower_bound(const PlanProblem& problem) {
  const CostModel& cost = problem.cost;
  const int hdp = problem.layout.hdp;
  const double most =
      static_cast<double>(problem.capacity_tokens) / problem.memory.resident_fraction(1.0);
  double total_tokens = 0.0;
  double slowest = 0.0;
  double area = 0.0;  // with every sample on its least degree
  std::vector<Critical> samples;
  samples.reserve(problem.samples.size());
  for (const SampleInfo& info : problem.samples) {
    Critical sample{cost.work(info.tokens), static_cast<double>(info.tokens), 1};
    const double ranks = std::ceil(sample.tokens / most * (1.0 - kRounding));
    sample.least = static_cast<int>(std::clamp<double>(ranks, 1.0, hdp));
    total_tokens += sample.tokens;
    slowest = std::max(slowest, std::min(cost.unit_time(sample.work, info.tokens, sample.least),
                                         cost.unit_time(sample.work, info.tokens, hdp)));
    area += sample.work + cost.exchange * (sample.least - 1) * sample.tokens;
    samples.push_back(sample);
  }
  if (most > 0) area += cost.fixed * std::ceil(total_tokens / most * (1.0 - 1e-9));
  const double start = std::max(slowest, area / hdp);
  if (cost.exchange <= 0.0) return start;  // the area does not depend on degrees
  std::erase_if(samples, [&](const Critical& sample) {
    const double alone = sample.work / sample.least + cost.fixed +
                         cost.exchange * (sample.least - 1) / sample.least * sample.tokens;
    return alone <= start || sample.work <= cost.exchange * sample.tokens;
  });
  const auto possible = [&](double limit) {
    double sum = area;
    for (const Critical& sample : samples) {
      sum +=
          cost.exchange * (degree_within(cost, sample, limit, hdp) - sample.least) * sample.tokens;
    }
    return sum * (1.0 - kRounding) <= hdp * limit;
  };
  if (possible(start)) return start;
  double low = start;
  double high = start * 2.0;
  while (!possible(high)) {
    low = high;
    high *= 2.0;
  }
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = 0.5 * (low + high);
    (possible(middle) ? high : low) = middle;
  }
  return low;
}

}  // namespace meshloom::plan
