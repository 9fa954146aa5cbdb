#include "meshloom/plan/rank_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::plan {

std::vector<PlacedUnit> placed_units(const StepPlan& plan) {
  std::vector<PlacedUnit> result;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    const auto& units = plan.slots[s].units;
    for (std::size_t u = 0; u < units.size(); ++u) {
      result.push_back({units[u], static_cast<int>(s), static_cast<int>(u)});
    }
  }
  return result;
}

std::map<std::int64_t, std::vector<int>> sample_ranks(const StepPlan& plan) {
  std::map<std::int64_t, std::vector<int>> result;
  for (const Slot& slot : plan.slots) {
    for (const Unit& unit : slot.units) {
      for (const std::int64_t id : unit.samples) result[id] = unit.ranks;
    }
  }
  return result;
}

RankPlan rank_plan(const StepPlan& plan, int rank) {
  MESHLOOM_CHECK(rank >= 0 && rank < plan.layout.hdp, "plan.rank_plan",
                 fmt::format("rank is {}, expected 0 .. {}", rank, plan.layout.hdp - 1));
  std::unordered_map<std::int64_t, std::int64_t> tokens;
  for (const SampleInfo& sample : plan.samples) tokens.emplace(sample.id, sample.tokens);
  RankPlan result{.rank = rank, .units = {}};
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    const auto& units = plan.slots[s].units;
    for (std::size_t u = 0; u < units.size(); ++u) {
      const auto at = std::find(units[u].ranks.begin(), units[u].ranks.end(), rank);
      if (at == units[u].ranks.end()) continue;
      RankUnit mine;
      static_cast<Unit&>(mine) = units[u];
      mine.slot = static_cast<int>(s);
      mine.index = static_cast<int>(u);
      mine.member = static_cast<int>(at - units[u].ranks.begin());
      mine.cu_seqlens.push_back(0);
      mine.local_cu_seqlens.push_back(0);
      for (const std::int64_t id : mine.samples) {
        const auto found = tokens.find(id);
        if (found == tokens.end()) {
          throw PlanError(
              "plan.rank_plan",
              fmt::format("slot {}, unit {}: sample {} is not one of the step's", s, u, id));
        }
        const auto ranges =
            member_ranges(found->second, static_cast<int>(mine.ranks.size()), mine.member);
        mine.cu_seqlens.push_back(mine.cu_seqlens.back() + found->second);
        mine.local_cu_seqlens.push_back(mine.local_cu_seqlens.back() + ranges[0].size() +
                                        ranges[1].size());
        mine.ranges.push_back(ranges);
      }
      result.units.push_back(std::move(mine));
    }
  }
  return result;
}

}  // namespace meshloom::plan
