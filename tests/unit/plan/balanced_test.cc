#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "meshloom/core/random.h"
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

}  // namespace
}  // namespace meshloom::plan
