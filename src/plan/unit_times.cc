#include "plan/internal/unit_times.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "meshloom/core/error.h"

namespace meshloom::plan::detail {
namespace {

int lockstep_width(const StepPlan& plan) {
  if (plan.lockstep == Lockstep::kHdp) return plan.layout.hdp;
  return plan.lockstep == Lockstep::kEp ? plan.layout.ep : 1;
}

}  // namespace

TokensById::TokensById(const std::vector<SampleInfo>& samples) : samples_(samples) {
  for (std::size_t i = 0; i < samples.size(); ++i) {
    if (samples[i].id == static_cast<std::int64_t>(i)) continue;
    for (const SampleInfo& sample : samples) table_.emplace(sample.id, sample.tokens);
    break;
  }
}

std::int64_t TokensById::operator()(std::int64_t id) const {
  if (table_.empty() && id >= 0 && id < static_cast<std::int64_t>(samples_.size())) {
    return samples_[static_cast<std::size_t>(id)].tokens;
  }
  const auto found = table_.find(id);
  if (found == table_.end()) {
    throw PlanError("plan.predict", fmt::format("sample {} is not one of the step's", id));
  }
  return found->second;
}

double unit_time(const StepPlan& plan, const TokensById& tokens_of, std::size_t slot,
                 const Unit& unit) {
  for (const int rank : unit.ranks) {
    if (rank < 0 || rank >= plan.layout.hdp) {
      throw PlanError("plan.predict", fmt::format("slot {}: rank {}, expected 0 .. {}", slot, rank,
                                                  plan.layout.hdp - 1));
    }
  }
  if (unit.ranks.empty()) {
    throw PlanError("plan.predict", fmt::format("slot {}: a unit without ranks", slot));
  }
  double work = 0.0;
  std::int64_t sum = 0;
  for (const std::int64_t id : unit.samples) {
    const std::int64_t tokens = tokens_of(id);
    work += plan.cost.work(tokens);
    sum += tokens;
  }
  return plan.cost.unit_time(work, sum, static_cast<int>(unit.ranks.size()));
}

std::vector<Together> together(const StepPlan& plan, const TokensById& tokens_of,
                               std::size_t slot) {
  const auto& units = plan.slots[slot].units;
  const int width = lockstep_width(plan);
  std::vector<Together> result;
  if (width == 1) {
    for (const Unit& unit : units) {
      const double time = unit_time(plan, tokens_of, slot, unit);
      result.push_back({unit.ranks, std::vector<double>(unit.ranks.size(), time), time});
    }
    return result;
  }
  const auto hdp = static_cast<std::size_t>(plan.layout.hdp);
  std::vector<std::size_t> parent(hdp);
  std::iota(parent.begin(), parent.end(), std::size_t{0});
  const auto root = [&](std::size_t rank) {
    while (parent[rank] != rank) rank = parent[rank] = parent[parent[rank]];
    return rank;
  };
  std::vector<double> times(hdp, 0.0);
  std::vector<char> runs(hdp, 0);
  for (const Unit& unit : units) {
    const double time = unit_time(plan, tokens_of, slot, unit);
    for (const int rank : unit.ranks) {
      times[static_cast<std::size_t>(rank)] = time;
      parent[root(static_cast<std::size_t>(rank))] =
          root(static_cast<std::size_t>(unit.ranks.front()));
      for (int member = rank / width * width; member < (rank / width + 1) * width; ++member) {
        runs[static_cast<std::size_t>(member)] = 1;
        parent[root(static_cast<std::size_t>(member))] = root(static_cast<std::size_t>(rank));
      }
    }
  }
  std::unordered_map<std::size_t, std::size_t> index;  // by root
  for (std::size_t rank = 0; rank < hdp; ++rank) {
    if (!runs[rank]) continue;
    const auto [found, added] = index.emplace(root(rank), result.size());
    if (added) result.emplace_back();
    Together& group = result[found->second];
    group.ranks.push_back(static_cast<int>(rank));
    group.rank_times.push_back(times[rank]);
    group.time = std::max(group.time, times[rank]);
  }
  return result;
}

}  // namespace meshloom::plan::detail
