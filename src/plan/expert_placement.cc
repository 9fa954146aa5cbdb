#include "meshloom/plan/expert_placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "meshloom/core/check.h"

namespace meshloom::plan {
namespace {

constexpr const char* kPlacementWhere = "plan.place_experts";

/// Items in packs of equal numbers of items: which pack, and which place in it.
struct Packing {
  std::vector<int> pack;
  std::vector<int> place;
};

Packing pack_evenly(const std::vector<double>& loads, int packs) {
  const std::size_t items = loads.size();
  const int most = static_cast<int>(items) / packs;
  std::vector<std::size_t> order(items);
  std::iota(order.begin(), order.end(), std::size_t{0});
  // One item a pack stays in order: nothing can be gained.
  if (most > 1) {
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return loads[a] > loads[b]; });
  }
  Packing result{std::vector<int>(items), std::vector<int>(items)};
  std::vector<double> load(static_cast<std::size_t>(packs), 0.0);
  std::vector<int> held(static_cast<std::size_t>(packs), 0);
  for (std::size_t i = 0; i < items; ++i) {
    const std::size_t item = order[i];
    std::size_t best = most > 1 ? load.size() : i;
    for (std::size_t p = 0; most > 1 && p < load.size(); ++p) {
      if (held[p] < most && (best == load.size() || load[p] < load[best])) best = p;
    }
    result.pack[item] = static_cast<int>(best);
    result.place[item] = held[best]++;
    load[best] += loads[item];
  }
  return result;
}

void check_placement(std::span<const double> loads, const PlacementProblem& p) {
  const auto experts = static_cast<int>(loads.size());
  const auto divides = [](int part, int whole, const char* what) {
    MESHLOOM_CHECK(part >= 1 && whole % part == 0, kPlacementWhere,
                   fmt::format("{}: {} does not divide {}", what, part, whole));
  };
  divides(p.groups, experts, "groups of experts");
  divides(p.nodes, p.ranks, "nodes of ranks");
  divides(p.ranks, p.replicas, "ranks of replicas");
  MESHLOOM_CHECK(experts >= 1 && p.replicas >= experts, kPlacementWhere,
                 fmt::format("{} places for {} experts", p.replicas, experts));
  for (std::size_t e = 0; e < loads.size(); ++e) {
    MESHLOOM_CHECK(std::isfinite(loads[e]) && loads[e] >= 0.0, kPlacementWhere,
                   fmt::format("load of expert {} is {}", e, loads[e]));
  }
}

}  // namespace

ExpertPlacement place_experts(std::span<const double> loads, PlacementProblem problem) {
  check_placement(loads, problem);
  if (problem.groups % problem.nodes != 0) problem.groups = problem.nodes = 1;
  const auto experts = static_cast<int>(loads.size());
  const int group_size = experts / problem.groups;
  const int groups_per_node = problem.groups / problem.nodes;
  const int node_experts = experts / problem.nodes;
  const int node_places = problem.replicas / problem.nodes;
  const int node_ranks = problem.ranks / problem.nodes;
  const int rank_places = problem.replicas / problem.ranks;

  std::vector<double> group_loads(static_cast<std::size_t>(problem.groups), 0.0);
  for (int e = 0; e < experts; ++e) {
    group_loads[static_cast<std::size_t>(e / group_size)] += loads[static_cast<std::size_t>(e)];
  }
  const Packing groups = pack_evenly(group_loads, problem.nodes);
  std::vector<int> by_node(loads.size());  // experts, node by node
  for (int g = 0; g < problem.groups; ++g) {
    const auto at = static_cast<std::size_t>(g);
    const int first = (groups.pack[at] * groups_per_node + groups.place[at]) * group_size;
    for (int i = 0; i < group_size; ++i) {
      by_node[static_cast<std::size_t>(first + i)] = g * group_size + i;
    }
  }

  const auto places = static_cast<std::size_t>(problem.replicas);
  ExpertPlacement result{std::vector<int>(places), std::vector<int>(places),
                         std::vector<int>(loads.size(), 1)};
  for (int node = 0; node < problem.nodes; ++node) {
    const int* const own = by_node.data() + node * node_experts;
    std::vector<int> expert(own, own + node_experts);
    std::vector<int> replica(expert.size(), 0);
    const auto share = [&](int e) {
      const auto at = static_cast<std::size_t>(e);
      return loads[at] / result.count[at];
    };
    for (int place = node_experts; place < node_places; ++place) {
      const int heaviest = *std::max_element(own, own + node_experts,
                                             [&](int a, int b) { return share(a) < share(b); });
      expert.push_back(heaviest);
      replica.push_back(result.count[static_cast<std::size_t>(heaviest)]++);
    }
    std::vector<double> shares;
    for (const int e : expert) shares.push_back(share(e));
    const Packing ranks = pack_evenly(shares, node_ranks);
    for (std::size_t i = 0; i < expert.size(); ++i) {
      const auto place = static_cast<std::size_t>(node * node_places + ranks.pack[i] * rank_places +
                                                  ranks.place[i]);
      result.expert[place] = expert[i];
      result.replica[place] = replica[i];
    }
  }
  return result;
}

}  // namespace meshloom::plan
