#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "any_problem.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/bounds.h"
#include "meshloom/plan/exact.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::plan {
namespace {

using testing::any_mesh_problem;
using testing::any_problem;

/// Plans of the short run, and of the full one (MESHLOOM_FULL).
constexpr std::int64_t kPlans = 1600;
constexpr std::int64_t kFullPlans = 1'000'000;
/// A bound and a makespan are sums of the same terms in another order.
constexpr double kRounding = 1e-9;

struct Seeds {
  std::int64_t from = 0;
  std::int64_t to = 0;
};

/// MESHLOOM_FUZZ_SEEDS=FROM:TO asks for others, so that a long sweep can be run in parts.
Seeds seeds_asked() {
  long long from = 0;
  long long to = std::getenv("MESHLOOM_FULL") == nullptr ? kPlans : kFullPlans;
  if (const char* text = std::getenv("MESHLOOM_FUZZ_SEEDS")) {
    if (std::sscanf(text, "%lld:%lld", &from, &to) != 2) ADD_FAILURE() << "not FROM:TO: " << text;
  }
  return {from, to};
}

/// Two of three plans are `balanced`; `exact` is for few samples.
const char* strategy_of(std::uint64_t seed) {
  constexpr const char* kOthers[] = {"bytescale", "naive_hdp", "static"};
  return seed % 3 < 2 ? "balanced" : kOthers[seed / 3 % 3];
}

/// Every contract of the plan and of its programs, without the check inside `make_plan`.
std::vector<Violation> broken(const PlanProblem& problem, const StepPlan& plan,
                              bool with_programs) {
  std::vector<Violation> found = check_plan(plan);
  if (with_programs) {
    const auto more = check_programs(plan, compile(plan, {.layers = 12}));
    found.insert(found.end(), more.begin(), more.end());
  }
  const double bound = lower_bound(problem);
  const double time = plan.predicted.step_time && problem.layout.pp > 1
                          ? *plan.predicted.step_time * problem.layout.pp
                          : plan.predicted.makespan;
  if (time * (1.0 + kRounding) < bound) found.push_back({"bound", "shorter than the lower bound"});
  return found;
}

// A problem is refused only where a sample does not fit the axis, and here all do: whatever
// make_plan throws is a failure.
TEST(PlannerFuzz, EveryPlanPassesTheVerifierAndTheBound) {
  const Seeds seeds = seeds_asked();
  std::int64_t planned = 0;
  std::int64_t balanced = 0;
  std::int64_t meshes = 0;
  std::int64_t whole_axis = 0;
  for (auto i = seeds.from; i < seeds.to; ++i) {
    const auto seed = static_cast<std::uint64_t>(i);
    const bool mesh = seed % 16 == 7;
    const PlanProblem problem = mesh ? any_mesh_problem(seed, 24, 40) : any_problem(seed, 130, 60);
    const std::string strategy = strategy_of(seed);
    StepPlan plan;
    ASSERT_NO_THROW(plan = make_plan(problem, strategy)) << strategy << " seed " << seed;
    for (const Violation& violation : broken(problem, plan, mesh || seed % 64 == 0)) {
      ADD_FAILURE() << strategy << " seed " << seed << ": " << violation.message;
    }
    ++planned;
    balanced += strategy == "balanced";
    meshes += mesh;
    whole_axis += seed % 8 == 0;
  }
  std::printf(
      "%lld plans (%lld balanced, %lld with pp, ep or lockstep, %lld with a sample that "
      "just fits the axis)\n",
      static_cast<long long>(planned), static_cast<long long>(balanced),
      static_cast<long long>(meshes), static_cast<long long>(whole_axis));
}

TEST(PlannerFuzz, BalancedIsAFunctionOfTheProblem) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const PlanProblem problem =
        seed % 4 == 0 ? any_mesh_problem(seed, 24, 40) : any_problem(seed, 130, 60);
    ASSERT_EQ(make_plan(problem, "balanced"), make_plan(problem, "balanced")) << "seed " << seed;
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
    EXPECT_LE(lower_bound(problem), exact.makespan * (1.0 + kRounding)) << "seed " << seed;
    if (!exact.optimal) continue;
    const double ratio = make_plan(problem, "balanced").predicted.makespan / exact.makespan;
    EXPECT_LE(ratio, kMost) << "seed " << seed;
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
