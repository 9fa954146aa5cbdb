#include <gtest/gtest.h>

#include "meshloom/core/error.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/schedule.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::all_text;
using testing::hand_made_plan;

std::vector<Op> ops(const Program& program) {
  std::vector<Op> result;
  for (const auto& instruction : program.instructions) result.push_back(instruction.op);
  return result;
}

TEST(Compile, RankRunsItsSlotsForwardThenBackward) {
  const auto programs = compile(hand_made_plan(), {.layers = 3});
  ASSERT_EQ(programs.size(), 4U);
  EXPECT_EQ(ops(programs[3]),
            (std::vector<Op>{Op::kLoad, Op::kForward, Op::kBackward, Op::kReduce, Op::kStep}));
  EXPECT_EQ(ops(programs[1]),
            (std::vector<Op>{Op::kLoad, Op::kForward, Op::kBackward, Op::kLoad, Op::kForward,
                             Op::kBackward, Op::kReduce, Op::kStep}));
  EXPECT_EQ(programs[1].step, 7);
  EXPECT_EQ(programs[1].instructions[4].slot, 1);
  EXPECT_EQ(programs[1].instructions[4].unit, 0);
}

TEST(Compile, ExchangesMeetTheUnitInRingOrderOncePerLayer) {
  const auto programs = compile(hand_made_plan(), {.layers = 3});
  const std::vector<Rendezvous> expected{{RendezvousKind::kExchange, RankList{2, 0, 3}, 3}};
  EXPECT_EQ(programs[0].instructions[0].rendezvous, std::vector<Rendezvous>{});
  EXPECT_EQ(programs[0].instructions[1].rendezvous, expected);
  EXPECT_EQ(programs[0].instructions[2].rendezvous, expected);
  EXPECT_EQ(programs[1].instructions[1].rendezvous, std::vector<Rendezvous>{});  // a bin
}

TEST(Compile, GradientsMeetAllReplicas) {
  const auto programs = compile(hand_made_plan(), {});
  const auto& reduce = programs[2].instructions[programs[2].instructions.size() - 2];
  EXPECT_EQ(reduce.op, Op::kReduce);
  EXPECT_EQ(reduce.rendezvous,
            (std::vector<Rendezvous>{{RendezvousKind::kGradientSync, RankList{0, 1, 2, 3}, 1}}));
}

TEST(Compile, OneRankMeetsNobody) {
  const auto plan = make_plan(PlanProblem::from_lengths({5, 6}, {.hdp = 1}, 8), "naive_hdp");
  for (const auto& program : compile(plan, {})) {
    for (const auto& instruction : program.instructions) {
      EXPECT_TRUE(instruction.rendezvous.empty());
    }
  }
}

TEST(Compile, LockstepMembersRunSlotsIdle) {
  StepPlan plan = hand_made_plan();
  plan.lockstep = Lockstep::kHdp;
  predict_(plan);
  const auto programs = compile(plan, {.layers = 3});
  // Rank 3 has no unit in slot 1 and runs it with zero tokens.
  const auto& idle = programs[3].instructions[4];
  EXPECT_EQ(idle.op, Op::kForward);
  EXPECT_EQ(idle.slot, 1);
  EXPECT_EQ(idle.unit, -1);
  EXPECT_EQ(idle.rendezvous,
            (std::vector<Rendezvous>{{RendezvousKind::kGather, RankList{0, 1, 2, 3}, 3}}));
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");
}

TEST(Compile, ExpertGroupsDispatchWithIdleMembers) {
  StepPlan plan = hand_made_plan();
  plan.layout.ep = 2;
  plan.lockstep = Lockstep::kEp;
  predict_(plan);
  const auto programs = compile(plan, {.layers = 3});
  const auto& idle = programs[3].instructions[4];  // beside rank 2
  EXPECT_EQ(idle.unit, -1);
  EXPECT_EQ(idle.rendezvous,
            (std::vector<Rendezvous>{{RendezvousKind::kDispatch, RankList{2, 3}, 6}}));
  const auto& reduce = programs[3].instructions[programs[3].instructions.size() - 2];
  EXPECT_EQ(reduce.rendezvous[1],
            (Rendezvous{RendezvousKind::kGradientSync, RankList{1, 3}, 1}));  // same experts
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");
}

TEST(Compile, TensorRanksMeetAndKeepTheirPlanes) {
  StepPlan plan = hand_made_plan();
  plan.layout.tp = 2;
  const auto programs = compile(plan, {.layers = 3});
  ASSERT_EQ(programs.size(), 8U);
  const auto& forward = programs[1].instructions[1];  // tp 1 of HDP rank 0
  EXPECT_EQ(forward.rendezvous,
            (std::vector<Rendezvous>{{RendezvousKind::kTensor, RankList{0, 1}, 6},
                                     {RendezvousKind::kExchange, RankList{5, 1, 7}, 3}}));
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");
}

TEST(Compile, OneRankAloneGivesTheSameProgram) {
  StepPlan plan = hand_made_plan();
  plan.layout.ep = 2;
  plan.lockstep = Lockstep::kHdp;
  predict_(plan);
  const CompileOptions options{.layers = 5};
  const auto programs = compile(plan, options);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(compile_rank(plan, options, rank), programs[static_cast<std::size_t>(rank)]);
  }
}

TEST(Compile, UnusablePlansAreRefused) {
  StepPlan plan = hand_made_plan();
  plan.slots[0].units[1].ranks = {9};
  EXPECT_THROW((void)compile(plan, {}), PlanError);
  plan.slots[0].units[1].ranks = {0};
  EXPECT_THROW((void)compile(plan, {}), PlanError);
  EXPECT_THROW((void)compile(hand_made_plan(), {.layers = 0}), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::plan
