#include "meshloom/plan/bounds.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace meshloom::plan {
namespace {

/// Comparisons of sums of times lean towards the smaller bound by this part: rounding must never
/// lift a bound above an optimum.
constexpr double kRounding = 1e-12;
/// Halvings of the interval in which the bound lies.
constexpr int kHalvings = 48;
/// Samples among which two are looked for that can't run at the same time.
constexpr std::size_t kMostApart = 24;

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

/// Least area that two samples add beyond `first` and `second` ranks, if they must not run at the
/// same time and one after another end within `limit`; infinite if they can't. Degrees are taken
/// as real numbers, which can only make it smaller.
double apart(const CostModel& cost, const Critical& a, int first, const Critical& b, int second,
             double limit, int hdp) {
  const double per_rank_a = cost.exchange * a.tokens;
  const double per_rank_b = cost.exchange * b.tokens;
  const double shared_a = a.work - per_rank_a;  // the part of its time that falls with 1 / degree
  const double shared_b = b.work - per_rank_b;
  const double left = limit - cost.fixed - per_rank_a - per_rank_b;
  // Samples that more ranks make slower: their degree can't help.
  if (shared_a <= 0.0 || shared_b <= 0.0) return 0.0;
  if (left * hdp * (1.0 + kRounding) < shared_a + shared_b) {
    return std::numeric_limits<double>::infinity();
  }
  if (shared_a / first + shared_b / second <= left) return 0.0;
  // Lagrange: degrees go with sqrt(shared / price), as far as they are above the least ones.
  const double sum = std::sqrt(shared_a * per_rank_a) + std::sqrt(shared_b * per_rank_b);
  double degree_a = per_rank_a > 0.0 ? std::sqrt(shared_a / per_rank_a) * sum / left : first;
  double degree_b = per_rank_b > 0.0 ? std::sqrt(shared_b / per_rank_b) * sum / left : second;
  if (degree_a < first) {
    degree_a = first;
    degree_b = shared_b / (left - shared_a / degree_a);
  } else if (degree_b < second) {
    degree_b = second;
    degree_a = shared_a / (left - shared_b / degree_b);
  }
  return per_rank_a * (degree_a - first) + per_rank_b * (degree_b - second);
}

/// What the cheapest pair of the largest samples that can't all run at one time adds; 0 if they
/// can.
double area_apart(const CostModel& cost, const std::vector<Critical>& largest, double limit,
                  int hdp) {
  std::vector<int> degrees;
  int sum = 0;
  for (const Critical& sample : largest) {
    degrees.push_back(degree_within(cost, sample, limit, hdp));
    sum += degrees.back();
    if (sum > hdp) break;
  }
  if (sum <= hdp) return 0.0;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < degrees.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      least =
          std::min(least, apart(cost, largest[i], degrees[i], largest[j], degrees[j], limit, hdp));
    }
  }
  return least;
}

}  // namespace

// Proof. Let a plan have makespan M. (1) A unit that holds sample i lasts at least as long as if it
// held i alone, so its degree D satisfies time_i(D) <= M, and memory's D >= least_i. Time over D is
// monotone ((w - x t) / D + x t + f), hence D >= D_i(M), the smallest such degree. (2) A unit of D
// ranks keeps them busy for sum w + D f + x (D - 1) sum t; sample i's part of that, w + x (D - 1)
// t, is at least w + x (D_i(M) - 1) t. (3) It holds at most D times the tokens that one rank holds,
// so the sum of degrees over all units is at least ceil(tokens / that), each costing f. With A(M)
// the sum of (2) and (3), the ranks' time gives A(M) <= hdp M. (4) Take samples whose D_i(M) sum to
// more than hdp: their units can't all run at one time. Intervals that meet pairwise have a point
// in common, so two of these samples do not overlap, or share a unit; either way their times,
// with one fixed cost, sum to at most M, and (2) holds for the degrees that this takes. The
// cheapest such pair adds its area to A(M). (5) With the samples taken in a fixed order until their
// degrees sum to more than hdp, all of this falls as M grows (D_i(M) falls, so more samples are
// taken, so there are more pairs to choose from), and every makespan is at least the smallest T
// with A(T) <= hdp T and time_i(D) <= T for some D, for every i.
double lower_bound(const PlanProblem& problem) {
  const CostModel& cost = problem.cost;
  const int hdp = problem.layout.hdp;
  const double most =
      static_cast<double>(problem.capacity_tokens) / problem.memory.resident_fraction(1.0);
  double total_tokens = 0.0;
  double slowest = 0.0;
  double area = 0.0;  // with every sample on its least degree
  std::vector<Critical> samples;
  std::vector<Critical> largest;
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
  largest = samples;
  const auto heavier = [](const Critical& a, const Critical& b) { return a.work > b.work; };
  const std::size_t few = std::min(largest.size(), kMostApart);
  std::partial_sort(largest.begin(), largest.begin() + static_cast<std::ptrdiff_t>(few),
                    largest.end(), heavier);
  largest.resize(few);
  if (cost.exchange > 0.0) {
    std::erase_if(samples, [&](const Critical& sample) {
      const double alone = sample.work / sample.least + cost.fixed +
                           cost.exchange * (sample.least - 1) / sample.least * sample.tokens;
      return alone <= start || sample.work <= cost.exchange * sample.tokens;
    });
  } else {
    samples.clear();  // their area does not depend on degrees
  }
  const auto possible = [&](double limit) {
    double sum = area;
    for (const Critical& sample : samples) {
      sum +=
          cost.exchange * (degree_within(cost, sample, limit, hdp) - sample.least) * sample.tokens;
    }
    sum += area_apart(cost, largest, limit, hdp);
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
