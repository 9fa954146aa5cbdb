#include <algorithm>
#include <cstdint>
#include <numeric>

#include "plan/strategies/slot_builder.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

/// The baseline that everybody ships: one context-parallel degree for the whole step, the smallest
/// divisor of hdp that holds the longest sample; documents packed in the order given into rows of
/// degree * capacity tokens; rows dealt round robin to the groups.
class StaticStrategy final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    const int hdp = problem.layout.hdp;
    std::int64_t longest = 0;
    for (const SampleInfo& sample : problem.samples) longest = std::max(longest, sample.tokens);
    int degree = hdp;
    for (int d = 1; d <= hdp; ++d) {
      if (hdp % d == 0 &&
          problem.memory.unit_capacity(problem.capacity_tokens, d, 0.0) >= longest) {
        degree = d;
        break;
      }
    }
    // Only where the whole axis needs it does this baseline offload, and then every row alike.
    const double offload =
        problem.memory.offload_needed(problem.capacity_tokens, degree, longest).value_or(0.0);
    const std::int64_t row = problem.memory.unit_capacity(problem.capacity_tokens, degree, offload);

    SlotBuilder builder(hdp);
    const int groups = hdp / degree;
    int next_group = 0;
    Unit unit;
    std::int64_t held = 0;
    const auto flush = [&] {
      unit.ranks.resize(static_cast<std::size_t>(degree));
      std::iota(unit.ranks.begin(), unit.ranks.end(), next_group * degree);
      unit.exchange = degree == 1 ? Exchange::kLocal : Exchange::kRing;
      unit.offload = offload;
      builder.add(std::move(unit));
      unit = Unit{};
      held = 0;
      next_group = (next_group + 1) % groups;
    };
    for (const SampleInfo& sample : problem.samples) {
      if (held > 0 && sample.tokens > row - held) flush();
      unit.samples.push_back(sample.id);
      held += sample.tokens;
    }
    if (held > 0) flush();
    return std::move(builder).take();
  }
};

}  // namespace

std::shared_ptr<BalanceStrategy> make_static() { return std::make_shared<StaticStrategy>(); }

}  // namespace meshloom::plan
