#include "meshloom/plan/step_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_map>

#include "meshloom/core/error.h"
#include "meshloom/plan/bounds.h"

namespace meshloom::plan {
namespace {

constexpr std::array<std::string_view, 5> kExchangeNames{"local", "ring", "all_gather", "ulysses",
                                                         "ring_ulysses"};
constexpr std::array<std::string_view, 3> kLockstepNames{"none", "ep", "hdp"};

template <class Enum, std::size_t N>
Enum parse_name(std::string_view name, const std::array<std::string_view, N>& names,
                const char* what) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    throw InvalidArgument("plan.step_plan", fmt::format("unknown {} \"{}\"; known: {}", what, name,
                                                        fmt::join(names, ", ")));
  }
  return static_cast<Enum>(found - names.begin());
}

/// Tokens by sample id. Ids are usually 0 .. n-1; then no table is needed.
class TokensById {
 public:
  explicit TokensById(const std::vector<SampleInfo>& samples) : samples_(samples) {
    for (std::size_t i = 0; i < samples.size(); ++i) {
      if (samples[i].id == static_cast<std::int64_t>(i)) continue;
      for (const SampleInfo& sample : samples) table_.emplace(sample.id, sample.tokens);
      break;
    }
  }
  std::int64_t operator()(std::int64_t id) const {
    if (table_.empty() && id >= 0 && id < static_cast<std::int64_t>(samples_.size())) {
      return samples_[static_cast<std::size_t>(id)].tokens;
    }
    const auto found = table_.find(id);
    if (found == table_.end()) {
      throw PlanError("plan.predict", fmt::format("sample {} is not one of the step's", id));
    }
    return found->second;
  }

 private:
  const std::vector<SampleInfo>& samples_;
  std::unordered_map<std::int64_t, std::int64_t> table_;
};

struct UnitLoad {
  std::int64_t tokens = 0;
  double time = 0.0;
};

UnitLoad unit_load(const Unit& unit, const CostModel& cost, const TokensById& tokens_of) {
  UnitLoad load;
  double work = 0.0;
  for (const std::int64_t id : unit.samples) {
    const std::int64_t tokens = tokens_of(id);
    work += cost.work(tokens);
    load.tokens += tokens;
  }
  load.time = cost.unit_time(work, load.tokens, static_cast<int>(unit.ranks.size()));
  return load;
}

void check_ranks(const Unit& unit, int hdp, std::size_t slot) {
  for (const int rank : unit.ranks) {
    if (rank < 0 || rank >= hdp) {
      throw PlanError("plan.predict",
                      fmt::format("slot {}: rank {}, expected 0 .. {}", slot, rank, hdp - 1));
    }
  }
  if (unit.ranks.empty()) {
    throw PlanError("plan.predict", fmt::format("slot {}: a unit without ranks", slot));
  }
}

/// Runs one slot in lockstep: units and lockstep groups that share a rank wait for each other.
void advance_in_lockstep(const Slot& slot, const std::vector<double>& times, int group,
                         std::vector<double>& free_at) {
  std::vector<int> parent(free_at.size());
  std::iota(parent.begin(), parent.end(), 0);
  const auto root = [&](int rank) {
    while (parent[rank] != rank) rank = parent[rank] = parent[parent[rank]];
    return rank;
  };
  for (const Unit& unit : slot.units) {
    for (const int rank : unit.ranks) {
      parent[root(rank)] = root(unit.ranks.front());
      for (int member = rank / group * group; member < (rank / group + 1) * group; ++member) {
        parent[root(member)] = root(rank);
      }
    }
  }
  std::unordered_map<int, double> longest;  // of the running components
  for (std::size_t u = 0; u < slot.units.size(); ++u) {
    double& time = longest[root(slot.units[u].ranks.front())];
    time = std::max(time, times[u]);
  }
  std::unordered_map<int, double> start;
  for (int rank = 0; rank < static_cast<int>(free_at.size()); ++rank) {
    if (!longest.contains(root(rank))) continue;
    double& time = start[root(rank)];
    time = std::max(time, free_at[rank]);
  }
  for (int rank = 0; rank < static_cast<int>(free_at.size()); ++rank) {
    const auto found = longest.find(root(rank));
    if (found != longest.end()) free_at[rank] = start[root(rank)] + found->second;
  }
}

}  // namespace

std::string_view to_string(Exchange exchange) {
  return kExchangeNames.at(static_cast<std::size_t>(exchange));
}

std::string_view to_string(Lockstep lockstep) {
  return kLockstepNames.at(static_cast<std::size_t>(lockstep));
}

Exchange parse_exchange(std::string_view name) {
  return parse_name<Exchange>(name, kExchangeNames, "exchange");
}

Lockstep parse_lockstep(std::string_view name) {
  return parse_name<Lockstep>(name, kLockstepNames, "lockstep");
}

std::int64_t StepPlan::total_tokens() const {
  std::int64_t total = 0;
  for (const SampleInfo& sample : samples) total += sample.tokens;
  return total;
}

std::int64_t StepPlan::total_loss_tokens() const {
  std::int64_t total = 0;
  for (const SampleInfo& sample : samples) total += sample.loss_tokens;
  return total;
}

std::vector<double> rank_finish_times(const StepPlan& plan) {
  plan.layout.validate();
  const TokensById tokens_of(plan.samples);
  std::vector<double> free_at(static_cast<std::size_t>(plan.layout.hdp), 0.0);
  std::vector<double> times;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    const Slot& slot = plan.slots[s];
    times.clear();
    for (const Unit& unit : slot.units) {
      check_ranks(unit, plan.layout.hdp, s);
      times.push_back(unit_load(unit, plan.cost, tokens_of).time);
    }
    const int group = plan.lockstep == Lockstep::kHdp  ? plan.layout.hdp
                      : plan.lockstep == Lockstep::kEp ? plan.layout.ep
                                                       : 1;
    if (group > 1) {
      advance_in_lockstep(slot, times, group, free_at);
      continue;
    }
    for (std::size_t u = 0; u < slot.units.size(); ++u) {
      double start = 0.0;
      for (const int rank : slot.units[u].ranks) start = std::max(start, free_at[rank]);
      for (const int rank : slot.units[u].ranks) free_at[rank] = start + times[u];
    }
  }
  return free_at;
}

void predict_(StepPlan& plan) {
  const std::vector<double> finish = rank_finish_times(plan);
  const double makespan = finish.empty() ? 0.0 : *std::max_element(finish.begin(), finish.end());
  double work = 0.0;
  for (const SampleInfo& sample : plan.samples) work += plan.cost.work(sample.tokens);
  const TokensById tokens_of(plan.samples);
  std::int64_t exchange_tokens = 0;
  for (const Slot& slot : plan.slots) {
    for (const Unit& unit : slot.units) {
      if (unit.ranks.size() < 2) continue;
      std::int64_t tokens = 0;
      for (const std::int64_t id : unit.samples) tokens += tokens_of(id);
      exchange_tokens += static_cast<std::int64_t>(unit.ranks.size() - 1) * tokens;
    }
  }
  plan.predicted.makespan = makespan;
  plan.predicted.efficiency = makespan > 0 ? work / (plan.layout.hdp * makespan) : 1.0;
  plan.predicted.exchange_tokens = exchange_tokens;

  PlanProblem problem;
  problem.step = plan.step;
  problem.layout = plan.layout;
  problem.capacity_tokens = plan.capacity_tokens;
  problem.lockstep = plan.lockstep;
  problem.memory = plan.memory;
  problem.cost = plan.cost;
  problem.samples = plan.samples;
  plan.predicted.lower_bound = lower_bound(problem);
}

}  // namespace meshloom::plan
