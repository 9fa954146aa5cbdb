#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/plan/bounds.h"
#include "support.h"

namespace meshloom::plan {
namespace {

PlanProblem problem_of(const std::vector<std::int64_t>& lengths, int hdp, std::int64_t capacity) {
  return PlanProblem::from_lengths(lengths, {.hdp = hdp}, capacity);
}

TEST(Static, DegreeIsTheSmallestDivisorThatHoldsTheLongest) {
  // 250 tokens over ranks of 100 need 3 of 12; a unit of every row has 3 neighbouring ranks.
  const auto plan = make_plan(problem_of({50, 250, 120, 130, 60, 10}, 12, 100), "static");
  ASSERT_EQ(plan.slots.size(), 1U);
  const auto& units = plan.slots[0].units;
  // Rows of 300 tokens in the given order: 50 + 250 | 120 + 130 | 60 + 10 would fit the second row.
  ASSERT_EQ(units.size(), 3U);
  EXPECT_EQ(units[0].samples, (std::vector<std::int64_t>{0, 1}));
  EXPECT_EQ(units[0].ranks, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(units[1].samples, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(units[1].ranks, (std::vector<int>{3, 4, 5}));
  EXPECT_EQ(units[2].samples, (std::vector<std::int64_t>{4, 5}));
}

TEST(Static, ShortDocumentsStayLocal) {
  const auto plan = make_plan(problem_of({50, 60, 70, 80}, 2, 100), "static");
  ASSERT_EQ(plan.slots.size(), 2U);
  for (const auto& slot : plan.slots) {
    for (const auto& unit : slot.units) EXPECT_EQ(unit.exchange, Exchange::kLocal);
  }
  EXPECT_EQ(plan.predicted.exchange_tokens, 0);
}

// The published example: one 768K sequence on 96 of 128 ranks of 8K, beside 32 sequences of 8K.
TEST(NaiveHdp, LongSampleTakesOnlyTheRanksItNeeds) {
  std::vector<std::int64_t> lengths(33, 8 * 1024);
  lengths[0] = 768 * 1024;
  const auto plan = make_plan(problem_of(lengths, 128, 8 * 1024), "naive_hdp");
  ASSERT_EQ(plan.slots.size(), 1U);
  ASSERT_EQ(plan.slots[0].units.size(), 33U);
  EXPECT_EQ(plan.slots[0].units[0].ranks.size(), 96U);
  for (std::size_t u = 1; u < 33; ++u) EXPECT_EQ(plan.slots[0].units[u].ranks.size(), 1U);
}

TEST(NaiveHdp, ShortSamplesArePackedBestFit) {
  // In order: 60 opens a bin; 70 another; 30 fits best beside 70; 40 beside 60.
  const auto plan = make_plan(problem_of({60, 70, 30, 40}, 2, 100), "naive_hdp");
  ASSERT_EQ(plan.slots.size(), 1U);
  ASSERT_EQ(plan.slots[0].units.size(), 2U);
  EXPECT_EQ(plan.slots[0].units[0].samples, (std::vector<std::int64_t>{0, 3}));
  EXPECT_EQ(plan.slots[0].units[1].samples, (std::vector<std::int64_t>{1, 2}));
}

TEST(Problem, MalformedInputNamesTheField) {
  const auto refusal = [](const std::function<void(PlanProblem&)>& change) -> std::string {
    PlanProblem problem = problem_of({10, 20}, 2, 100);
    change(problem);
    try {
      (void)make_plan(problem, "naive_hdp");
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "accepted";
  };
  const auto has = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  has(refusal([](PlanProblem& p) { p.capacity_tokens = 0; }), "capacity_tokens is 0");
  has(refusal([](PlanProblem& p) { p.samples.clear(); }), "samples is empty");
  has(refusal([](PlanProblem& p) { p.samples[1].tokens = 0; }), "samples[1] (id 1): tokens is 0");
  has(refusal([](PlanProblem& p) { p.samples[1].tokens = -5; }), "tokens is -5");
  has(refusal(
          [](PlanProblem& p) { p.samples[1].tokens = std::numeric_limits<std::int64_t>::max(); }),
      "samples[1] (id 1): tokens is");
  has(refusal([](PlanProblem& p) { p.samples[1].loss_tokens = 21; }), "loss_tokens is 21");
  has(refusal([](PlanProblem& p) { p.samples[1].id = 0; }), "id 0 occurs more than once");
  has(refusal([](PlanProblem& p) { p.samples[1].tokens = 201; }), "do not fit the whole axis");
  has(refusal([](PlanProblem& p) { p.layout.hdp = 0; }), "hdp is 0");
  has(refusal([](PlanProblem& p) { p.cost.quadratic = -1; }), "quadratic is -1");
  has(refusal([](PlanProblem& p) { p.ranks_per_node = -1; }), "ranks_per_node is -1");
  has(refusal([](PlanProblem& p) { p.step = -1; }), "step is -1");
}

TEST(Problem, ExpertParallelismBringsLockstep) {
  PlanProblem problem = problem_of({10, 20, 30, 40}, 4, 100);
  problem.layout.ep = 2;
  EXPECT_EQ(make_plan(problem, "naive_hdp").lockstep, Lockstep::kEp);
  problem.lockstep = Lockstep::kHdp;
  EXPECT_EQ(make_plan(problem, "naive_hdp").lockstep, Lockstep::kHdp);
}

TEST(MakePlan, UnknownStrategyListsKnownOnes) {
  try {
    (void)make_plan(problem_of({10}, 1, 100), "best");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("naive_hdp, static"), std::string::npos)
        << error.what();
  }
}

TEST(MakePlan, StrategyThatBreaksAContractIsRefused) {
  const auto lossy = make_strategy([](const PlanProblem&) {
    return std::vector<Slot>{{.units = {{.ranks = {0}, .samples = {0}}}}};
  });
  try {
    (void)make_plan(problem_of({10, 20}, 2, 100), "lossy", *lossy);
    FAIL();
  } catch (const PlanError& error) {
    EXPECT_NE(std::string(error.what()).find("sample 1"), std::string::npos) << error.what();
  }
}

TEST(IntoSlots, EachRankMeetsItsUnitsInOrder) {
  const auto slots = into_slots({{.ranks = {0, 1}, .samples = {0}, .exchange = Exchange::kRing},
                                 {.ranks = {2}, .samples = {1}},
                                 {.ranks = {1, 2}, .samples = {2}, .exchange = Exchange::kRing},
                                 {.ranks = {0}, .samples = {3}}},
                                3);
  ASSERT_EQ(slots.size(), 2U);
  EXPECT_EQ(slots[0].units[1].samples, (std::vector<std::int64_t>{1}));
  EXPECT_EQ(slots[1].units[0].samples, (std::vector<std::int64_t>{2}));
  EXPECT_EQ(slots[1].units[1].samples, (std::vector<std::int64_t>{3}));
  EXPECT_THROW((void)into_slots({{.ranks = {3}, .samples = {0}}}, 3), PlanError);
  EXPECT_THROW((void)into_slots({{.ranks = {}, .samples = {0}}}, 3), PlanError);
}

/// A random problem: any rank count, capacity, cost; lengths up to what the whole axis holds.
PlanProblem any_problem() {
  const int hdp = *rc::gen::inRange(1, 131);
  const auto capacity = *rc::gen::inRange<std::int64_t>(1, 5000);
  PlanProblem problem;
  problem.layout.hdp = hdp;
  problem.capacity_tokens = capacity;
  if (*rc::gen::arbitrary<bool>()) problem.memory = {.layers = *rc::gen::inRange(1, 40)};
  problem.cost = {.quadratic = *rc::gen::element(0.0, 1.0, 3.5),
                  .linear = *rc::gen::element(1.0, 24576.0),
                  .fixed = *rc::gen::element(0.0, 1e6),
                  .exchange = *rc::gen::element(0.0, 100.0)};
  const auto most = problem.memory.unit_capacity(capacity, hdp, 1.0);
  const auto lengths = *rc::gen::nonEmpty(rc::gen::container<std::vector<std::int64_t>>(
      rc::gen::oneOf(rc::gen::inRange<std::int64_t>(1, most + 1),
                     rc::gen::inRange<std::int64_t>(1, std::min(most, capacity) + 1),
                     rc::gen::element<std::int64_t>(1, most, std::min(most, capacity)))));
  auto id = *rc::gen::inRange<std::int64_t>(-5, 5);
  for (const auto tokens : lengths) {
    problem.samples.push_back({id, tokens, *rc::gen::inRange<std::int64_t>(0, tokens + 1)});
    id += *rc::gen::inRange(1, 4);
  }
  if (*rc::gen::arbitrary<bool>()) std::reverse(problem.samples.begin(), problem.samples.end());
  problem.lockstep = *rc::gen::element(Lockstep::kNone, Lockstep::kEp, Lockstep::kHdp);
  for (int ep = *rc::gen::inRange(1, 5); ep > 0; --ep) {
    if (hdp % ep == 0) {
      problem.layout.ep = ep;
      break;
    }
  }
  return problem;
}

// make_plan verifies; what fits the whole axis is always scheduled.
RC_GTEST_PROP(Strategies, BaselinesScheduleWhateverFits, ()) {
  const PlanProblem problem = any_problem();
  for (const char* name : {"static", "naive_hdp"}) {
    const StepPlan plan = make_plan(problem, name);
    RC_ASSERT(plan.predicted.lower_bound <= plan.predicted.makespan * (1 + 1e-9));
    RC_ASSERT(plan.predicted.efficiency <= 1 + 1e-9);
    RC_ASSERT(make_plan(problem, name) == plan);
    RC_ASSERT(StepPlan::from_json(plan.to_json()) == plan);
  }
}

// Whatever single field of a valid plan is turned, the verifier notices or the plan stays valid.
RC_GTEST_PROP(Strategies, TamperedPlansAreRefused, ()) {
  StepPlan plan = make_plan(any_problem(), "naive_hdp");
  auto& slot = plan.slots[*rc::gen::inRange<std::size_t>(0, plan.slots.size())];
  auto& unit = slot.units[*rc::gen::inRange<std::size_t>(0, slot.units.size())];
  switch (*rc::gen::inRange(0, 6)) {
    case 0:
      unit.samples.push_back(unit.samples[0]);
      break;
    case 1:
      unit.samples.pop_back();
      break;
    case 2:
      unit.ranks.push_back(unit.ranks[0]);
      break;
    case 3:
      unit.ranks[0] = plan.layout.hdp + *rc::gen::inRange(0, 3);
      break;
    case 4:
      unit.samples[0] = 1'000'000;
      break;
    default:
      slot.units.push_back(unit);
  }
  RC_ASSERT(!check_plan(plan).empty());
}

}  // namespace
}  // namespace meshloom::plan
