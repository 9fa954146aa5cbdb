#include <gtest/gtest.h>

#include "meshloom/core/error.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::hand_made_plan;

TEST(Predict, HandMadePlanComesOut) {
  const StepPlan plan = hand_made_plan();
  const auto work = [](double s) { return s * s + 10 * s; };
  // Slot 0: {2,0,3} holds 300 tokens, {1} holds 40 + 60. Slot 1: {1,2} waits for both.
  const double first = work(300) / 3 + 5 + 0.5 * 2.0 / 3 * 300;
  const double bin = work(40) + work(60) + 5;
  const double second = work(150) / 2 + 5 + 0.5 * 0.5 * 150;
  const auto finish = rank_finish_times(plan);
  ASSERT_EQ(finish.size(), 4U);
  EXPECT_DOUBLE_EQ(finish[3], first);
  EXPECT_DOUBLE_EQ(finish[0], first + work(100) + 5);
  EXPECT_DOUBLE_EQ(finish[1], std::max(first, bin) + second);
  EXPECT_DOUBLE_EQ(finish[2], finish[1]);
  EXPECT_DOUBLE_EQ(plan.predicted.makespan, std::max(finish[0], finish[1]));
  const double total = work(300) + work(40) + work(60) + work(100) + work(150);
  EXPECT_DOUBLE_EQ(plan.predicted.efficiency, total / (4 * plan.predicted.makespan));
  EXPECT_EQ(plan.predicted.exchange_tokens, 2 * 300 + 1 * 150);
  EXPECT_LE(plan.predicted.lower_bound, plan.predicted.makespan);
  EXPECT_GE(plan.predicted.lower_bound, total / 4);
}

TEST(Predict, IdleMembersWaitInLockstep) {
  StepPlan plan = hand_made_plan();
  plan.layout.ep = 2;
  plan.lockstep = Lockstep::kEp;
  // Slot 0: groups {0,1} and {2,3} are tied by the unit {2,0,3}; slot 1: {1,2} ties them again.
  const auto free_running = rank_finish_times(hand_made_plan());
  const auto finish = rank_finish_times(plan);
  const double slot0 = free_running[3];
  const auto work = [](double s) { return s * s + 10 * s; };
  const double slot1 = std::max(work(100) + 5, work(150) / 2 + 5 + 0.5 * 0.5 * 150);
  for (const double time : finish) EXPECT_DOUBLE_EQ(time, slot0 + slot1);
}

TEST(Predict, LockstepLeavesGroupsOfASlotApart) {
  StepPlan plan = hand_made_plan();
  plan.layout.ep = 2;
  plan.lockstep = Lockstep::kEp;
  plan.samples = {{0, 10, 9}, {1, 20, 19}, {2, 30, 29}};
  plan.slots.assign(1, {});
  plan.slots[0].units = {{.ranks = {0}, .samples = {0}},
                         {.ranks = {2}, .samples = {1}},
                         {.ranks = {3}, .samples = {2}}};
  const auto finish = rank_finish_times(plan);
  EXPECT_DOUBLE_EQ(finish[0], 10 * 10 + 10 * 10 + 5);
  EXPECT_DOUBLE_EQ(finish[1], finish[0]);
  EXPECT_DOUBLE_EQ(finish[2], 30 * 30 + 10 * 30 + 5);
  EXPECT_DOUBLE_EQ(finish[3], finish[2]);
}

TEST(Predict, UnknownSampleOrRankIsRefusedNotRead) {
  StepPlan plan = hand_made_plan();
  plan.slots[0].units[0].samples = {99};
  EXPECT_THROW(predict_(plan), PlanError);
  plan = hand_made_plan();
  plan.slots[0].units[0].ranks = {4};
  EXPECT_THROW((void)rank_finish_times(plan), PlanError);
  plan.slots[0].units[0].ranks = {};
  EXPECT_THROW((void)rank_finish_times(plan), PlanError);
}

}  // namespace
}  // namespace meshloom::plan
