#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::all_text;
using testing::expect_violation;
using testing::hand_made_plan;

/// A plan with every prediction made again after the change, so that only the change is at fault.
std::vector<Violation> plan_after(const std::function<void(StepPlan&)>& change) {
  StepPlan plan = hand_made_plan();
  change(plan);
  return check_plan(plan);
}

TEST(VerifyPlan, HandMadePlanIsValid) {
  EXPECT_EQ(all_text(check_plan(hand_made_plan())), "");
  EXPECT_NO_THROW(verify(hand_made_plan()));
}

TEST(VerifyPlan, SampleTwiceIsNamedWithBothPlaces) {
  expect_violation(plan_after([](StepPlan& p) { p.slots[1].units[1].samples.push_back(11); }),
                   "conservation", {"slot 1, unit 1", "sample 11", "slot 0, unit 1"});
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[1].samples = {11, 11};
                   }),
                   "conservation", {"slot 0, unit 1", "sample 11"});
}

TEST(VerifyPlan, LostSampleIsNamed) {
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[1].samples = {11}; }),
                   "conservation", {"sample 12", "60 tokens", "no unit"});
}

TEST(VerifyPlan, BorrowedSampleIsNamed) {
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[1].samples = {11, 12, 99};
                   }),
                   "conservation", {"slot 0, unit 1", "sample 99"});
}

TEST(VerifyPlan, RankInTwoUnitsOfASlotIsNamed) {
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[1].ranks = {3}; }), "disjoint",
                   {"slot 0", "rank 3", "unit 0", "unit 1"});
}

TEST(VerifyPlan, RanksOffTheAxisOrRepeatedAreNamed) {
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[0].ranks = {2, 4, 3};
                   }),
                   "ranks", {"slot 0, unit 0", "rank 4", "0 .. 3"});
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[0].ranks = {2, -1, 3};
                   }),
                   "ranks", {"rank -1"});
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[0].ranks = {2, 0, 2};
                   }),
                   "ranks", {"slot 0, unit 0", "rank 2 is listed twice"});
}

TEST(VerifyPlan, EmptyUnitsAndSlotsAreNamed) {
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[1].ranks.clear(); }), "empty",
                   {"slot 0, unit 1", "no ranks"});
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[1].samples.clear(); }), "empty",
                   {"slot 0, unit 1", "no samples"});
  expect_violation(plan_after([](StepPlan& p) { p.slots.emplace_back(); }), "empty",
                   {"slot 2", "no units"});
}

TEST(VerifyPlan, OverCapacityIsNamed) {
  expect_violation(plan_after([](StepPlan& p) { p.capacity_tokens = 99; }), "capacity",
                   {"slot 0, unit 0", "300 tokens", "sample 10", "[2, 0, 3]", "99"});
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[0].ranks = {2, 0};
                   }),
                   "capacity", {"slot 0, unit 0", "300 tokens"});
}

TEST(VerifyPlan, OffloadMakesRoomOnlyWithAMemoryModel) {
  const auto shrink = [](StepPlan& p) {
    p.slots[0].units[0].ranks = {2, 0};
    p.slots[0].units[0].offload = 0.5;
  };
  expect_violation(plan_after(shrink), "offload", {"slot 0, unit 0", "memory.layers is 0"});
  const auto with_memory = [&](StepPlan& p) {
    p.memory = {.layers = 12, .resident_layers = 2};  // 300 * (2 + 5) / 12 = 175 <= 200
    shrink(p);
    predict_(p);
  };
  EXPECT_EQ(all_text(plan_after(with_memory)), "");
  expect_violation(plan_after([&](StepPlan& p) {
                     with_memory(p);
                     p.slots[0].units[0].offload = 0.3;  // 300 * 9 / 12 = 225
                   }),
                   "capacity", {"slot 0, unit 0", "225", "after offload 0.3"});
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[0].offload = 1.5; }), "offload",
                   {"offload is 1.5"});
  expect_violation(plan_after([](StepPlan& p) {
                     p.slots[0].units[0].offload = std::numeric_limits<double>::quiet_NaN();
                   }),
                   "offload", {"slot 0, unit 0"});
}

TEST(VerifyPlan, ExchangeMustFitTheUnit) {
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[0].exchange = Exchange::kLocal; }),
                   "exchange", {"slot 0, unit 0", "local on 3 rank"});
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[1].exchange = Exchange::kRing; }),
                   "exchange", {"slot 0, unit 1", "ring on 1 rank"});
  const auto ulysses = [](int degree) {
    return [degree](StepPlan& p) {
      p.slots[0].units[0].exchange = Exchange::kRingUlysses;
      p.slots[0].units[0].ulysses_degree = degree;
    };
  };
  EXPECT_EQ(all_text(plan_after(ulysses(3))), "");
  expect_violation(plan_after(ulysses(2)), "exchange", {"ulysses_degree is 2", "divisor of 3"});
  expect_violation(plan_after(ulysses(0)), "exchange", {"ulysses_degree is 0"});
  expect_violation(plan_after([](StepPlan& p) { p.slots[0].units[0].ulysses_degree = 3; }),
                   "exchange", {"ulysses_degree is 3 with exchange ring"});
}

TEST(VerifyPlan, LossTokensMustFitTokens) {
  expect_violation(plan_after([](StepPlan& p) { p.samples[1].loss_tokens = 41; }), "loss_tokens",
                   {"sample 11", "41 loss tokens", "0 .. 40"});
  expect_violation(plan_after([](StepPlan& p) { p.samples[1].loss_tokens = -1; }), "loss_tokens",
                   {"sample 11"});
}

TEST(VerifyPlan, MembershipMustBeSound) {
  expect_violation(plan_after([](StepPlan& p) { p.samples[1].id = 10; }), "samples",
                   {"sample 10 is listed twice"});
  expect_violation(plan_after([](StepPlan& p) { p.samples[1].tokens = 0; }), "samples",
                   {"sample 11"});
}

TEST(VerifyPlan, LockstepMustFollowExpertParallelism) {
  const auto with_ep = [](Lockstep lockstep) {
    return [lockstep](StepPlan& p) {
      p.layout.ep = 2;
      p.lockstep = lockstep;
      predict_(p);
    };
  };
  expect_violation(plan_after(with_ep(Lockstep::kNone)), "lockstep", {"layout.ep is 2"});
  EXPECT_EQ(all_text(plan_after(with_ep(Lockstep::kEp))), "");
  EXPECT_EQ(all_text(plan_after(with_ep(Lockstep::kHdp))), "");
}

TEST(VerifyPlan, PredictionsAreRecomputed) {
  expect_violation(plan_after([](StepPlan& p) { p.predicted.makespan *= 0.999; }), "prediction",
                   {"predicted.makespan"});
  expect_violation(plan_after([](StepPlan& p) { p.predicted.efficiency = 1.0; }), "prediction",
                   {"predicted.efficiency is 1"});
  expect_violation(plan_after([](StepPlan& p) { ++p.predicted.exchange_tokens; }), "prediction",
                   {"predicted.exchange_tokens is 751, the slots give 750"});
  expect_violation(
      plan_after([](StepPlan& p) { p.predicted.lower_bound = p.predicted.makespan * 1.01; }),
      "prediction", {"predicted.lower_bound"});
}

TEST(VerifyPlan, SenselessHeadersAreRefusedBeforeAnythingElse) {
  expect_violation(plan_after([](StepPlan& p) { p.layout.hdp = 0; }), "layout",
                   {"layout.hdp is 0"});
  expect_violation(plan_after([](StepPlan& p) { p.layout.hdp = std::numeric_limits<int>::max(); }),
                   "layout", {"layout.hdp"});
  expect_violation(plan_after([](StepPlan& p) { p.layout.ep = 3; }), "layout", {"divisor"});
  expect_violation(plan_after([](StepPlan& p) { p.cost.linear = -1; }), "cost",
                   {"cost.linear is -1"});
  expect_violation(plan_after([](StepPlan& p) { p.capacity_tokens = 0; }), "capacity",
                   {"capacity_tokens is 0"});
  expect_violation(plan_after([](StepPlan& p) { p.memory.layers = -2; }), "memory", {"layers -2"});
  expect_violation(plan_after([](StepPlan& p) { p.step = -1; }), "step", {"step is -1"});
}

TEST(VerifyPlan, AllViolationsAreReportedAndCounted) {
  const auto change = [](StepPlan& p) {
    p.slots[0].units[0].ranks = {2, 9, 3};
    p.slots[0].units[1].samples = {11};
    p.samples[3].loss_tokens = 1000;
  };
  const auto violations = plan_after(change);
  expect_violation(violations, "ranks", {"rank 9"});
  expect_violation(violations, "conservation", {"sample 12"});
  expect_violation(violations, "loss_tokens", {"sample 13"});
  StepPlan plan = hand_made_plan();
  change(plan);
  try {
    verify(plan);
    FAIL();
  } catch (const PlanError& error) {
    EXPECT_NE(std::string(error.what()).find("[plan.verify] step 7: "), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("(and 2 more)"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace meshloom::plan
