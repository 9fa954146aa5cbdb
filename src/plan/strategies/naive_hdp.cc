#include <algorithm>
#include <cstdint>
#include <map>
#include <queue>
#include <tuple>
#include <utility>

#include "plan/strategies/slot_builder.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

struct SizedUnit {
  int degree = 1;
  double offload = 0.0;
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
    std::int64_t room = capacity;
    const auto fit = by_room.lower_bound(sample.tokens);
    if (fit == by_room.end()) {
      bins.emplace_back();
    } else {
      std::tie(room, bin) = *fit;
      by_room.erase(fit);
    }
    bins[bin].samples.push_back(sample.id);
    room -= sample.tokens;
    by_room.emplace(room, bin);
  }
  return bins;
}

SizedUnit on_fewest_ranks(const PlanProblem& problem, const SampleInfo& sample) {
  SizedUnit unit;
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
/// each to the ranks with the fewest micro-batches so far. The algorithm knows numbers of ranks and
/// no times.
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

    using NextRank = std::pair<int, int>;  // first slot in which the rank is free; lower rank first
    std::priority_queue<NextRank, std::vector<NextRank>, std::greater<>> next;
    for (int rank = 0; rank < problem.layout.hdp; ++rank) next.emplace(0, rank);
    SlotBuilder builder(problem.layout.hdp);
    for (SizedUnit& sized : units) {
      Unit unit;
      int slot = 0;
      for (int i = 0; i < sized.degree; ++i) {
        slot = next.top().first;
        unit.ranks.push_back(next.top().second);
        next.pop();
      }
      std::sort(unit.ranks.begin(), unit.ranks.end());
      for (const int rank : unit.ranks) next.emplace(slot + 1, rank);
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
