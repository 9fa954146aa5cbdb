#include "meshloom/plan/expert_replan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/plan/expert_placement.h"

namespace meshloom::plan::replanning {
namespace {

using Loads = std::vector<double>;

/// Expert e at place e.
HeldExperts in_order(std::vector<int> held) {
  HeldExperts result{.expert = {}, .held = std::move(held)};
  result.expert.resize(
      static_cast<std::size_t>(std::accumulate(result.held.begin(), result.held.end(), 0)));
  std::iota(result.expert.begin(), result.expert.end(), 0);
  return result;
}

/// Heavy-tailed and whole, as counts of choices are.
Loads random_loads(std::size_t experts, std::uint64_t seed) {
  Loads result;
  for (std::uint64_t e = 0; e < experts; ++e) {
    const double u = random_uniform(random_key("loads", seed), e);
    result.push_back(static_cast<double>(static_cast<std::int64_t>(1000.0 * u * u * u)));
  }
  return result;
}

std::vector<int> members_of(const HeldExperts& placed) {
  std::vector<int> result(placed.expert.size());
  std::size_t place = 0;
  for (std::size_t m = 0; m < placed.held.size(); ++m) {
    for (int i = 0; i < placed.held[m]; ++i) {
      result[static_cast<std::size_t>(placed.expert[place++])] = static_cast<int>(m);
    }
  }
  return result;
}

int moves_between(const HeldExperts& before, const HeldExperts& after) {
  const std::vector<int> from = members_of(before);
  const std::vector<int> to = members_of(after);
  int result = 0;
  for (std::size_t e = 0; e < from.size(); ++e) result += from[e] != to[e] ? 1 : 0;
  return result;
}

HeldExperts replanned(const Loads& loads, const HeldExperts& now, int groups = 1, int nodes = 1) {
  return {.expert = replan_experts(loads, now, groups, nodes), .held = now.held};
}

TEST(ReplanExperts, ExchangesWhatEvensOutAndNothingElse) {
  // 9 + 8 against 1 + 2, and 5 + 5 in between: one exchange of each heavy one does it.
  const HeldExperts now = in_order({2, 2, 2});
  const Loads loads{9, 8, 5, 5, 1, 2};
  const HeldExperts then = replanned(loads, now);
  EXPECT_DOUBLE_EQ(member_imbalance(loads, now), 17.0 / 10.0);
  EXPECT_DOUBLE_EQ(member_imbalance(loads, then), 1.0);
  EXPECT_EQ(moves_between(now, then), 2);
  // Who stays keeps the place, though the neighbour changed.
  EXPECT_EQ(then.expert, (std::vector<int>{5, 1, 2, 3, 4, 0}));
}

TEST(ReplanExperts, AnEvenPlacementStays) {
  const HeldExperts now = in_order({2, 2, 2, 2});
  EXPECT_EQ(replan_experts(Loads(8, 3.0), now), now.expert);
  EXPECT_EQ(replan_experts(Loads(8, 0.0), now), now.expert);
  EXPECT_EQ(replan_experts(Loads{4, 1, 3, 2, 2, 3, 1, 4}, now), now.expert);
  EXPECT_DOUBLE_EQ(member_imbalance(Loads(8, 0.0), now), 1.0);
  const HeldExperts one = in_order({4});
  EXPECT_EQ(replan_experts(Loads{9, 1, 1, 1}, one), one.expert);
}

TEST(ReplanExperts, NeverBusierThanEplbOrBefore) {
  int moved = 0;
  int moved_by_eplb = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const int ranks = seed % 2 == 0 ? 4 : 8;
    const Loads loads = random_loads(32, seed);
    HeldExperts now = in_order(std::vector<int>(static_cast<std::size_t>(ranks), 32 / ranks));
    const HeldExperts then = replanned(loads, now);
    const HeldExperts eplb{.expert = place_experts(loads, {.replicas = 32, .ranks = ranks}).expert,
                           .held = now.held};
    EXPECT_LE(member_imbalance(loads, then), member_imbalance(loads, eplb));
    EXPECT_LE(member_imbalance(loads, then), member_imbalance(loads, now));
    moved += moves_between(now, then);
    moved_by_eplb += moves_between(now, eplb);
    // Loads that drift a little move little more than the drift.
    Loads drifted = loads;
    for (std::size_t e = 0; e < 4; ++e) drifted[e] *= 1.05;
    EXPECT_LE(member_imbalance(drifted, replanned(drifted, then)), member_imbalance(drifted, then));
  }
  EXPECT_LT(moved, moved_by_eplb * 2 / 3);
}

/// The lightest busiest member of any placement, and the fewest moves to one no busier than
/// `limit`.
TEST(ReplanExperts, IsNearTheOptimumOfSmallCases) {
  int optimal = 0;
  int fewest = 0;
  constexpr int kCases = 60;
  for (std::uint64_t seed = 0; seed < kCases; ++seed) {
    const Loads loads = random_loads(8, seed + 100);
    const HeldExperts now = in_order({2, 2, 2, 2});
    const HeldExperts then = replanned(loads, now);
    const double limit = member_imbalance(loads, then);
    double lightest = std::numeric_limits<double>::infinity();
    int least = std::numeric_limits<int>::max();
    HeldExperts any = now;
    do {
      // Ascending within a member: every placement once.
      bool first = true;
      for (std::size_t p = 0; p < 8; p += 2) first = first && any.expert[p] < any.expert[p + 1];
      if (!first) continue;
      const double imbalance = member_imbalance(loads, any);
      lightest = std::min(lightest, imbalance);
      if (imbalance <= limit * (1.0 + 1e-12)) least = std::min(least, moves_between(now, any));
    } while (std::next_permutation(any.expert.begin(), any.expert.end()));
    EXPECT_LE(limit, 1.15 * lightest) << seed;
    optimal += limit <= lightest * (1.0 + 1e-12) ? 1 : 0;
    fewest += moves_between(now, then) == least ? 1 : 0;
  }
  EXPECT_GE(optimal, kCases * 9 / 10);
  EXPECT_GE(fewest, kCases * 9 / 10);
}

TEST(ReplanExperts, GroupsStayWholeOnNodes) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const Loads loads = random_loads(24, seed + 200);
    const HeldExperts now = in_order({6, 6, 6, 6});
    const HeldExperts then = replanned(loads, now, 6, 2);
    const std::vector<int> member = members_of(then);
    std::vector<int> groups(2, 0);
    for (std::size_t g = 0; g < 6; ++g) {
      const int node = member[4 * g] / 2;
      ++groups[static_cast<std::size_t>(node)];
      for (std::size_t e = 4 * g; e < 4 * g + 4; ++e) EXPECT_EQ(member[e] / 2, node);
    }
    EXPECT_EQ(groups, (std::vector<int>{3, 3}));
    const HeldExperts eplb{
        .expert =
            place_experts(loads, {.replicas = 24, .groups = 6, .nodes = 2, .ranks = 4}).expert,
        .held = now.held};
    EXPECT_LE(member_imbalance(loads, then), member_imbalance(loads, eplb));
    // Without groups that divide, nodes do not bind.
    EXPECT_EQ(replanned(loads, now, 5, 2).expert, replanned(loads, now).expert);
  }
}

TEST(ReplanExperts, MembersOfUnequalNumbersKeepThem) {
  const HeldExperts now = in_order({1, 2, 1, 2});
  const Loads loads{1, 30, 20, 2, 40, 3};
  const HeldExperts then = replanned(loads, now);
  EXPECT_LT(member_imbalance(loads, then), member_imbalance(loads, now));
  const HeldExperts idle = in_order({0, 1, 0, 1, 1});
  EXPECT_EQ(replan_experts(Loads{5, 1, 1}, idle), idle.expert);
}

TEST(ReplanExperts, WhatIsNoPlacementIsRefused) {
  const auto message = [](const Loads& loads, const HeldExperts& now,
                          int nodes = 1) -> std::string {
    try {
      (void)replan_experts(loads, now, 1, nodes);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return {};
  };
  EXPECT_NE(message({1, 1, 1}, in_order({1, 1})).find("2 members do not hold 3 experts"),
            std::string::npos);
  EXPECT_NE(message({1, 1}, {.expert = {0, 0}, .held = {1, 1}}).find("each of 2 experts once"),
            std::string::npos);
  EXPECT_NE(message({1, -2}, in_order({1, 1})).find("load of expert 1 is -2"), std::string::npos);
  EXPECT_NE(message({1, 1}, in_order({1, 1}), 0).find("on 0 nodes"), std::string::npos);
}

}  // namespace
}  // namespace meshloom::plan::replanning
