#include <algorithm>
#include <cstdint>
#include <map>
#include <queue>
#include <utility>

#include "plan/strategies/slot_builder.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

struct SizedUnit {
  int degree = 1;
  double offload = 0.0;
  double work = 0.0;
  std::int64_t tokens = 0;
  std::vector<std::int64_t> samples;
};

/// Best-fit packing of the samples below capacity, in the order given.
std::vector<SizedUnit> pack(const PlanProblem& problem) {
  const std::int64_t capacity = problem.capacity_tokens;
  std::vector<SizedUnit> bins;
  std::multimap<std::int64_t, std::size_t> by_room;  // room left -> bin
  for (const SampleInfo& sample : problem.samples) {
    if (sample.tokens >= capacity) continue;
    std::size_t bin = bins.size();
    const auto fit = by_room.lower_bound(sample.tokens);
    if (fit == by_room.end()) {
      bins.emplace_back();
    } else {
      bin = fit->second;
      by_room.erase(fit);
    }
    bins[bin].samples.push_back(sample.id);
    bins[bin].work += problem.cost.work(sample.tokens);
    bins[bin].tokens += sample.tokens;
    by_room.emplace(capacity - bins[bin].tokens, bin);
  }
  return bins;
}

SizedUnit on_fewest_ranks(const PlanProblem& problem, const SampleInfo& sample) {
  SizedUnit unit;
  unit.work = problem.cost.work(sample.tokens);
  unit.tokens = sample.tokens;
  unit.samples = {sample.id};
  const int hdp = problem.layout.hdp;
  const std::int64_t capacity = problem.capacity_tokens;
  if (const auto d = problem.memory.degree_needed(capacity, 0.0, sample.tokens, hdp)) {
    unit.degree = *d;
  } else {
    unit.degree = hdp;
    unit.offload = problem.memory.offload_needed(capacity, hdp, sample.tokens).value_or(1.0);
  }
  return unit;
}

/// ByteScale's algorithm 1: every sample at or above capacity on the fewest ranks that hold it, the
/// rest packed best-fit into single-rank bins; units in the order of the batch, long ones first,
/// each to the ranks that are free first.
class NaiveHdpStrategy final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    std::vector<SizedUnit> units;
    for (const SampleInfo& sample : problem.samples) {
      if (sample.tokens >= problem.capacity_tokens) {
        units.push_back(on_fewest_ranks(problem, sample));
      }
    }
    for (SizedUnit& bin : pack(problem)) units.push_back(std::move(bin));

    using FreeRank = std::pair<double, int>;  // time at which the rank is free; lower rank first
    std::priority_queue<FreeRank, std::vector<FreeRank>, std::greater<>> free;
    for (int rank = 0; rank < problem.layout.hdp; ++rank) free.emplace(0.0, rank);
    SlotBuilder builder(problem.layout.hdp);
    for (SizedUnit& sized : units) {
      Unit unit;
      double start = 0.0;
      for (int i = 0; i < sized.degree; ++i) {
        start = std::max(start, free.top().first);
        unit.ranks.push_back(free.top().second);
        free.pop();
      }
      std::sort(unit.ranks.begin(), unit.ranks.end());
      const double end = start + problem.cost.unit_time(sized.work, sized.tokens, sized.degree);
      for (const int rank : unit.ranks) free.emplace(end, rank);
      unit.samples = std::move(sized.samples);
      unit.exchange = sized.degree == 1 ? Exchange::kLocal : Exchange::kRing;
      unit.offload = sized.offload;
      builder.add(std::move(unit));
    }
    return std::move(builder).take();
  }
};

}  // namespace

std::shared_ptr<BalanceStrategy> make_naive_hdp() { return std::make_shared<NaiveHdpStrategy>(); }

}  // namespace meshloom::plan
