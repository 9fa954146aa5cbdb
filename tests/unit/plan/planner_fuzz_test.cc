#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "meshloom/core/random.h"
#include "meshloom/plan/bounds.h"
#include "meshloom/plan/exact.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::plan {
namespace {

/// Problems of the short run, and of the full one (MESHLOOM_FULL); each is planned by two
/// strategies. MESHLOOM_FUZZ_PLANS asks for another number.
constexpr std::int64_t kPlans = 1500;
constexpr std::int64_t kFullPlans = 500'000;
/// A bound and a makespan are sums of the same terms in another order.
constexpr double kRounding = 1e-9;

std::int64_t plans_asked() {
  const char* text = std::getenv("MESHLOOM_FUZZ_PLANS");
  if (text != nullptr) return std::atoll(text);
  return std::getenv("MESHLOOM_FULL") == nullptr ? kPlans : kFullPlans;
}

/// Any rank count up to 130, any lengths up to what the axis holds, any capacity.
PlanProblem any_problem(std::uint64_t seed, int most_ranks, int most_samples) {
  std::uint64_t next = 0;
  const std::uint64_t key = random_key("fuzz", seed);
  const auto below = [&](std::uint64_t n) { return random_bits(key, next++) % n; };
  PlanProblem problem;
  problem.layout.hdp = 1 + static_cast<int>(below(static_cast<std::uint64_t>(most_ranks)));
  problem.capacity_tokens = 1 + static_cast<std::int64_t>(below(1ull << (1 + below(15))));
  problem.cost.linear = below(2) ? 24576.0 : 0.0;
  problem.ranks_per_node = static_cast<int>(below(3) ? 0 : 1 + below(16));
  if (below(4) == 0) problem.memory = {32, 2};
  const std::uint64_t samples = 1 + below(static_cast<std::uint64_t>(most_samples));
  const std::int64_t most =
      problem.memory.unit_capacity(problem.capacity_tokens, problem.layout.hdp, 1.0);
  double work = 0.0;
  for (std::uint64_t i = 0; i < samples; ++i) {
    const double power = random_uniform(key, next++) * (below(2) ? 1.0 : 0.6);
    const auto tokens = std::clamp<std::int64_t>(
        static_cast<std::int64_t>(std::pow(static_cast<double>(most), power)), 1, most);
    problem.samples.push_back({static_cast<std::int64_t>(i) * 3, tokens, tokens - 1});
    work += problem.cost.work(tokens);
  }
  if (below(3) == 0) problem.cost.fixed = 0.02 * work / problem.layout.hdp;
  if (below(3) == 0) problem.cost.exchange = 0.1 * static_cast<double>(problem.capacity_tokens);
  return problem;
}

TEST(PlannerFuzz, EveryPlanPassesTheVerifierAndTheBound) {
  const std::int64_t plans = plans_asked();
  for (std::int64_t seed = 0; seed < plans; ++seed) {
    const PlanProblem problem = any_problem(static_cast<std::uint64_t>(seed), 130, 60);
    for (const std::string strategy : {"balanced", "bytescale"}) {
      StepPlan plan;
      ASSERT_NO_THROW(plan = make_plan(problem, strategy)) << strategy << " seed " << seed;
      ASSERT_GE(plan.predicted.makespan * (1.0 + kRounding), lower_bound(problem))
          << strategy << " seed " << seed;
    }
  }
}

TEST(PlannerFuzz, PipelinesAndLockstepPassTheVerifier) {
  const std::int64_t plans = plans_asked() / 10;
  for (std::int64_t seed = 0; seed < plans; ++seed) {
    PlanProblem problem = any_problem(static_cast<std::uint64_t>(seed), 24, 40);
    problem.layout.pp = 1 + static_cast<int>(seed % 4);
    problem.layout.chunks = 1 + static_cast<int>(seed % 2);
    if (problem.layout.hdp % 2 == 0) problem.layout.ep = 2;
    if (seed % 3 == 0) problem.lockstep = Lockstep::kHdp;
    StepPlan plan;
    ASSERT_NO_THROW(plan = make_plan(problem, "balanced")) << "seed " << seed;
    ASSERT_NO_THROW(verify(plan, compile(plan, {.layers = 12}))) << "seed " << seed;
    if (problem.layout.pp > 1) {
      ASSERT_GE(*plan.predicted.step_time * problem.layout.pp * (1.0 + kRounding),
                lower_bound(problem))
          << "seed " << seed;
    }
  }
}

TEST(PlannerFuzz, BalancedIsCloseToTheOptimumOfSmallCases) {
  constexpr double kOnAverage = 1.01;
  constexpr double kMost = 1.05;
  constexpr std::int64_t kVisits = 20'000;
  double sum = 0.0;
  int compared = 0;
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    const PlanProblem problem = any_problem(seed, 8, 7);
    const ExactResult exact = solve_exact(problem, kVisits);
    if (!exact.optimal) continue;
    const double ratio = make_plan(problem, "balanced").predicted.makespan / exact.makespan;
    EXPECT_LE(ratio, kMost) << "seed " << seed;
    EXPECT_LE(lower_bound(problem), exact.makespan * (1.0 + kRounding)) << "seed " << seed;
    sum += ratio;
    ++compared;
  }
  EXPECT_GE(compared, 40);
  EXPECT_LE(sum / compared, kOnAverage);
  RecordProperty("mean_ratio", std::to_string(sum / compared));
  RecordProperty("compared", compared);
}

}  // namespace
}  // namespace meshloom::plan
