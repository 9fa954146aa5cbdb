#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "meshloom/core/random.h"
#include "meshloom/plan/bounds.h"
#include "meshloom/plan/exact.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::plan {
namespace {

/// What the grain of whole samples may cost against cutting all of them.
constexpr double kLevelling = 1.002;

PlanProblem mixed_problem(int ranks, int documents, std::int64_t capacity, std::uint64_t seed) {
  PlanProblem problem;
  problem.layout.hdp = ranks;
  problem.capacity_tokens = capacity;
  const std::uint64_t key = random_key("lengths", seed);
  for (int i = 0; i < documents; ++i) {
    const bool tail = random_uniform(key, 2 * i) < 0.05;
    const double length = tail ? 4096.0 / (1.0 - random_uniform(key, 2 * i + 1))
                               : 600.0 * std::exp(random_normal(key, 1000000 + i));
    const double most = std::min<double>(196608.0, static_cast<double>(capacity) * ranks);
    const auto tokens = static_cast<std::int64_t>(std::clamp(length, 1.0, most));
    problem.samples.push_back({i, tokens, tokens - 1});
  }
  return problem;
}

TEST(Balanced, BeatsStaticAndNaive) {
  for (const int ranks : {1, 2, 3, 8, 13, 64}) {
    const PlanProblem problem = mixed_problem(ranks, 30 * ranks, 8192, 7);
    const Prediction balanced = make_plan(problem, "balanced").predicted;
    EXPECT_LE(balanced.makespan, make_plan(problem, "naive_hdp").predicted.makespan) << ranks;
    // One document too long for a rank makes `static` cut everything: level, at any traffic.
    const Prediction fixed = make_plan(problem, "static").predicted;
    EXPECT_LE(balanced.makespan, fixed.makespan * kLevelling) << ranks;
    EXPECT_LE(balanced.exchange_tokens, fixed.exchange_tokens) << ranks;
  }
}

TEST(Balanced, IsNoWorseThanByteScaleWhereOffloadMakesLongUnits) {
  PlanProblem problem = PlanProblem::from_lengths(
      {32768, 8192, 27, 47418, 61294, 32768, 32768, 32768, 1909, 58398, 8192}, {.hdp = 8}, 8192);
  problem.cost = {.quadratic = 0.0, .linear = 24576.0, .fixed = 291688243.2, .exchange = 49152.0};
  problem.memory.layers = 32;
  const double other = make_plan(problem, "bytescale").predicted.makespan;
  EXPECT_LE(make_plan(problem, "balanced").predicted.makespan, 1.01 * other);
}

TEST(Balanced, IsDeterministic) {
  const PlanProblem problem = mixed_problem(16, 500, 8192, 3);
  EXPECT_EQ(make_plan(problem, "balanced").slots, make_plan(problem, "balanced").slots);
}

TEST(Balanced, SchedulesWhatFitsTheWholeAxis) {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    PlanProblem problem;
    problem.layout.hdp = ranks;
    problem.capacity_tokens = 7;
    problem.samples = {{0, 7 * ranks, 0}, {1, 7 * ranks, 0}, {2, 1, 0}};
    EXPECT_NO_THROW((void)make_plan(problem, "balanced")) << ranks;
  }
}

TEST(Balanced, ReachesTheTableOfEfficiency) {
  double sum = 0.0;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    const StepPlan plan = make_plan(mixed_problem(16, 500, 16384, seed), "balanced");
    EXPECT_GE(plan.predicted.efficiency, 0.97) << seed;
    sum += plan.predicted.efficiency;
  }
  EXPECT_GE(sum / 10, 0.99);
}

TEST(Balanced, NeedsFewUnitsWhereEachHasACost) {
  constexpr double kAboveBound = 1.03;  // units hold whole documents
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    PlanProblem problem = mixed_problem(16, 400, 16384, seed);
    double work = 0.0;
    for (const SampleInfo& sample : problem.samples) work += problem.cost.work(sample.tokens);
    problem.cost.fixed = 0.02 * work / problem.layout.hdp;
    const Prediction predicted = make_plan(problem, "balanced").predicted;
    EXPECT_LE(predicted.makespan, kAboveBound * predicted.lower_bound) << seed;
  }
}

TEST(Balanced, LevelsDocumentsOfATenthOfARankEach) {
  // One document takes most of the step; the longest of the others are too large for a fluid.
  PlanProblem problem = mixed_problem(16, 300, 16384, 34);
  problem.cost.linear = 0.0;
  EXPECT_GE(make_plan(problem, "balanced").predicted.efficiency, 0.97);
}

TEST(Balanced, BoundKnowsThatTwoLongSamplesCanNotRunTogether) {
  // Two ranks hold each of two samples, and there are three: one after another, on all of them, a
  // sample takes (w - x t) / 3 + x t = 20,000.
  PlanProblem problem;
  problem.layout.hdp = 3;
  problem.capacity_tokens = 100;
  problem.cost = {.quadratic = 1.0, .linear = 0.0, .fixed = 0.0, .exchange = 50.0};
  problem.samples = {{0, 200, 0}, {1, 200, 0}};
  const ExactResult exact = solve_exact(problem);
  ASSERT_TRUE(exact.optimal);
  EXPECT_DOUBLE_EQ(exact.makespan, 40'000.0);
  EXPECT_NEAR(lower_bound(problem), 40'000.0, 1e-3);
  // A fourth rank lets them run together, on two each.
  problem.layout.hdp = 4;
  EXPECT_NEAR(lower_bound(problem), 25'000.0, 1e-3);
}

TEST(Balanced, LeavesNodesWhereTheyCostTheMakespan) {
  // Units of five ranks that last as long as the step: inside nodes of eight every node idles
  // three.
  PlanProblem problem;
  problem.layout.hdp = 40;
  problem.ranks_per_node = 8;
  problem.capacity_tokens = 1000;
  problem.cost = {.quadratic = 0.0, .linear = 1.0, .fixed = 0.0, .exchange = 0.0};
  for (int i = 0; i < 8; ++i) problem.samples.push_back({i, 5000, 0});
  const Prediction predicted = make_plan(problem, "balanced").predicted;
  EXPECT_NEAR(predicted.makespan, predicted.lower_bound, 1e-6);
}

TEST(Balanced, KeepsUnitsInsideNodesWhereTheyFit) {
  constexpr int kNode = 8;
  constexpr double kMostCrossing = 0.02;  // where only other nodes' ranks end in time
  int crossing = 0;
  int units = 0;
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    PlanProblem problem = mixed_problem(64, 1200, 8192, seed);
    problem.ranks_per_node = kNode;
    const StepPlan plan = make_plan(problem, "balanced");
    EXPECT_GE(plan.predicted.efficiency, 0.99) << seed;
    for (const Slot& slot : plan.slots) {
      for (const Unit& unit : slot.units) {
        if (unit.ranks.size() < 2 || unit.ranks.size() > kNode) continue;
        ++units;
        const auto [low, high] = std::minmax_element(unit.ranks.begin(), unit.ranks.end());
        crossing += *low / kNode != *high / kNode;
      }
    }
  }
  EXPECT_GE(units, 100);
  EXPECT_LE(crossing, kMostCrossing * units);
}

TEST(Balanced, LevelsMicroBatchesUnderAPipeline) {
  // Work over ranks and stages, and the bubble of some dozens of micro-batches.
  constexpr double kAboveIdeal = 1.35;
  for (const int stages : {2, 4, 8}) {
    PlanProblem problem = mixed_problem(8, 2400, 16384, 5);
    for (SampleInfo& sample : problem.samples) {
      sample.tokens = std::min<std::int64_t>(sample.tokens, 16384);
      sample.loss_tokens = sample.tokens - 1;
    }
    problem.layout.pp = stages;
    const StepPlan plan = make_plan(problem, "balanced");
    double work = 0.0;
    for (const SampleInfo& sample : problem.samples) work += problem.cost.work(sample.tokens);
    const double ideal = work / 8 / stages;
    EXPECT_LE(*plan.predicted.step_time, kAboveIdeal * ideal) << stages;
    for (const char* other : {"static", "naive_hdp", "bytescale"}) {
      const StepPlan theirs = make_plan(problem, other);
      EXPECT_LT(*plan.predicted.step_time, *theirs.predicted.step_time) << stages << " " << other;
    }
  }
}

TEST(Balanced, LevelsSlotsInLockstep) {
  constexpr double kAboveBound = 1.1;
  for (const Lockstep lockstep : {Lockstep::kEp, Lockstep::kHdp}) {
    PlanProblem problem = mixed_problem(16, 600, 16384, 6);
    problem.layout.ep = lockstep == Lockstep::kEp ? 4 : 1;
    problem.lockstep = lockstep;
    const StepPlan plan = make_plan(problem, "balanced");
    EXPECT_LE(*plan.predicted.step_time, kAboveBound * plan.predicted.lower_bound);
    EXPECT_EQ(*plan.predicted.step_time, plan.predicted.makespan);
    EXPECT_LT(plan.predicted.makespan, make_plan(problem, "naive_hdp").predicted.makespan);
  }
}

}  // namespace
}  // namespace meshloom::plan
