#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/plan/schedule.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::all_text;
using testing::expect_violation;
using testing::hand_made_plan;

std::vector<Violation> programs_after(const std::function<void(std::vector<Program>&)>& change) {
  const StepPlan plan = hand_made_plan();
  auto programs = compile(plan, {.layers = 2});
  change(programs);
  return check_programs(plan, programs);
}

void erase(Program& program, std::size_t index) {
  program.instructions.erase(program.instructions.begin() + static_cast<std::ptrdiff_t>(index));
}

TEST(VerifyPrograms, CompiledProgramsAreValid) {
  EXPECT_EQ(all_text(programs_after([](auto&) {})), "");
  const StepPlan plan = hand_made_plan();
  EXPECT_NO_THROW(verify(plan, compile(plan, {})));
}

TEST(VerifyPrograms, SkippedOrRepeatedWorkIsNamed) {
  expect_violation(programs_after([](auto& p) { erase(p[3], 2); }), "conservation",
                   {"rank 3", "slot 0", "unit 0", "backward happens 0 times"});
  expect_violation(programs_after([](auto& p) {
                     p[3].instructions.insert(p[3].instructions.begin() + 1, p[3].instructions[1]);
                   }),
                   "conservation", {"rank 3", "forward happens 2 times"});
  expect_violation(programs_after([](auto& p) { erase(p[3], 0); }), "order",
                   {"rank 3", "before its load"});
  expect_violation(
      programs_after([](auto& p) { std::swap(p[3].instructions[1], p[3].instructions[2]); }),
      "order", {"rank 3", "backward", "before its forward"});
  expect_violation(programs_after([](auto& p) { p[3].instructions[1].unit = 1; }), "conservation",
                   {"rank 3", "by the plan the rank is in unit 0"});
  expect_violation(programs_after([](auto& p) { p[3].instructions[1].slot = 1; }), "conservation",
                   {"rank 3", "has no part in the slot"});
  expect_violation(programs_after([](auto& p) { p[3].instructions[1].slot = 77; }), "conservation",
                   {"rank 3", "slot 77"});
}

TEST(VerifyPrograms, StepWithoutReduceIsNamed) {
  expect_violation(programs_after([](auto& p) { erase(p[2], p[2].instructions.size() - 2); }),
                   "conservation", {"rank 2 reduces 0 times"});
  expect_violation(programs_after([](auto& p) {
                     std::swap(p[2].instructions.end()[-1], p[2].instructions.end()[-2]);
                   }),
                   "order", {"rank 2", "before the reduce"});
  expect_violation(programs_after([](auto& p) { p[2].instructions.pop_back(); }), "conservation",
                   {"rank 2 steps 0 times"});
  expect_violation(programs_after([](auto& p) { p[2].instructions.end()[-2].rendezvous.clear(); }),
                   "rendezvous", {"rank 2", "all 4 HDP ranks"});
}

TEST(VerifyPrograms, RendezvousThatSomebodyMissesIsNamed) {
  expect_violation(programs_after([](auto& p) { p[3].instructions[2].rendezvous.clear(); }),
                   "rendezvous", {"[2, 0, 3]", "rank 3 never comes"});
  expect_violation(programs_after([](auto& p) { p[3].instructions[1].rendezvous[0].count = 1; }),
                   "rendezvous", {"rank 3", "2 times against 1"});
  expect_violation(programs_after([](auto& p) {
                     p[3].instructions[1].rendezvous[0].ranks = RankList{0, 2, 3};
                   }),
                   "rendezvous", {"rank 3", "another order"});
  expect_violation(
      programs_after([](auto& p) {
        p[1].instructions[1].rendezvous = {{RendezvousKind::kExchange, RankList{0, 2}, 1}};
      }),
      "rendezvous", {"rank 1", "leave this rank out"});
  expect_violation(
      programs_after([](auto& p) {
        p[1].instructions[1].rendezvous = {{RendezvousKind::kTensor, RankList{1, 44}, 1}};
      }),
      "rendezvous", {"rank 1", "[1, 44]", "0 .. 3"});
}

TEST(VerifyPrograms, HeadersMustAgree) {
  expect_violation(programs_after([](auto& p) { p.pop_back(); }), "programs", {"3 programs"});
  expect_violation(programs_after([](auto& p) { p[1].rank = 2; }), "programs", {"programs[1]"});
  expect_violation(programs_after([](auto& p) { p[1].step = 8; }), "programs", {"step 8"});
}

TEST(VerifyPrograms, PipelinesThatNeverMeetAreNamed) {
  for (const auto& [ep, kind, contract] : std::vector<std::tuple<int, RendezvousKind, const char*>>{
           {1, RendezvousKind::kExchange, "rendezvous"},
           {2, RendezvousKind::kDispatch, "lockstep"}}) {
    PlanProblem problem =
        PlanProblem::from_lengths({40, 9, 30, 7}, {.hdp = 4, .pp = 2, .ep = ep}, 12);
    if (ep > 1) problem.lockstep = Lockstep::kEp;
    const StepPlan plan = make_plan(problem, "balanced");
    const auto after = [&, kind = kind](int ranks) {
      auto programs = compile(plan, {.layers = 4});
      for (int rank = 0; rank < ranks; ++rank) {
        for (Instruction& instruction : programs[static_cast<std::size_t>(rank)].instructions) {
          std::erase_if(instruction.rendezvous,
                        [&](const Rendezvous& meeting) { return meeting.kind == kind; });
        }
      }
      return check_programs(plan, programs);
    };
    EXPECT_EQ(all_text(after(0)), "");
    expect_violation(after(8), contract, {"no piece of the model"});
    expect_violation(after(1), contract, {"rank 1"});
  }
}

TEST(VerifyPrograms, LockstepGroupMustMeet) {
  StepPlan plan = hand_made_plan();
  plan.lockstep = Lockstep::kHdp;
  predict_(plan);
  auto programs = compile(plan, {});
  for (auto& program : programs) {
    for (auto& instruction : program.instructions) {
      std::erase_if(instruction.rendezvous,
                    [](const Rendezvous& r) { return r.kind == RendezvousKind::kGather; });
    }
  }
  expect_violation(check_programs(plan, programs), "lockstep", {"rank 0", "lockstep group"});
}

/// Ranks 0 and 1 share slots 0 and 2; rank 1 alone has slot 1. Two stages; all programs by hand.
StepPlan shared_and_alone() {
  StepPlan plan;
  plan.strategy = "by hand";
  plan.layout = {.hdp = 2, .pp = 2};
  plan.capacity_tokens = 10;
  plan.samples = {{0, 20, 19}, {1, 10, 9}, {2, 20, 19}};
  plan.slots.resize(3);
  plan.slots[0].units = {{.ranks = {0, 1}, .samples = {0}, .exchange = Exchange::kRing}};
  plan.slots[1].units = {{.ranks = {1}, .samples = {1}}};
  plan.slots[2].units = {{.ranks = {0, 1}, .samples = {2}, .exchange = Exchange::kRing}};
  predict_(plan);
  return plan;
}

struct Action {
  Op op;
  int slot;
};

/// The programs in which HDP rank h of stage s computes order[s][h], with transfers around it.
std::vector<Program> pipeline(const StepPlan& plan,
                              const std::vector<std::vector<std::vector<Action>>>& order) {
  std::vector<Program> programs;
  for (int stage = 0; stage < 2; ++stage) {
    for (int hdp = 0; hdp < 2; ++hdp) {
      Program program{.step = plan.step,
                      .rank = plan.layout.rank({.hdp = hdp, .pp = stage}),
                      .instructions = {}};
      const int other = plan.layout.rank({.hdp = hdp, .pp = 1 - stage});
      std::vector<bool> loaded(plan.slots.size(), false);
      for (const Action& action :
           order[static_cast<std::size_t>(stage)][static_cast<std::size_t>(hdp)]) {
        const auto slot = static_cast<std::size_t>(action.slot);
        if (!loaded[slot])
          program.instructions.push_back({.op = Op::kLoad, .slot = action.slot, .unit = 0});
        loaded[slot] = true;
        const bool gradient = action.op == Op::kBackward;
        const bool receives = gradient ? stage == 0 : stage == 1;
        const Instruction transfer{
            .slot = action.slot, .unit = 0, .peer = other, .gradient = gradient};
        if (receives) {
          program.instructions.push_back(transfer);
          program.instructions.back().op = Op::kReceive;
        }
        Instruction compute{.op = action.op, .slot = action.slot, .unit = 0};
        if (plan.slots[slot].units[0].ranks.size() > 1) {
          compute.rendezvous = {{RendezvousKind::kExchange, RankList{2 * stage, 2 * stage + 1}, 4}};
        }
        program.instructions.push_back(compute);
        if (!receives) {
          program.instructions.push_back(transfer);
          program.instructions.back().op = Op::kSend;
        }
      }
      program.instructions.push_back(
          {.op = Op::kReduce,
           .rendezvous = {{RendezvousKind::kGradientSync, RankList{2 * stage, 2 * stage + 1}, 1}}});
      program.instructions.push_back({.op = Op::kStep});
      programs.push_back(std::move(program));
    }
  }
  return programs;
}

constexpr Op kF = Op::kForward;
constexpr Op kB = Op::kBackward;

TEST(VerifyPrograms, OneOrderPerStageRunsThrough) {
  // 1F1B over slot indices; rank 0 leaves slot 1 out of its stage's order.
  const std::vector<std::vector<std::vector<Action>>> order = {
      {{{kF, 0}, {kB, 0}, {kF, 2}, {kB, 2}},
       {{kF, 0}, {kF, 1}, {kB, 0}, {kF, 2}, {kB, 1}, {kB, 2}}},
      {{{kF, 0}, {kB, 0}, {kF, 2}, {kB, 2}},
       {{kF, 0}, {kB, 0}, {kF, 1}, {kB, 1}, {kF, 2}, {kB, 2}}}};
  const StepPlan plan = shared_and_alone();
  EXPECT_EQ(all_text(check_programs(plan, pipeline(plan, order))), "");
}

// Each rank runs 1F1B over its own units: rank 0 wants forward 2 with its peer before backward 0,
// its peer backward 0 before forward 2.
TEST(VerifyPrograms, OrderPerRankDeadlocks) {
  const std::vector<std::vector<std::vector<Action>>> order = {
      {{{kF, 0}, {kF, 2}, {kB, 0}, {kB, 2}},
       {{kF, 0}, {kF, 1}, {kB, 0}, {kF, 2}, {kB, 1}, {kB, 2}}},
      {{{kF, 0}, {kB, 0}, {kF, 2}, {kB, 2}},
       {{kF, 0}, {kB, 0}, {kF, 1}, {kB, 1}, {kF, 2}, {kB, 2}}}};
  const StepPlan plan = shared_and_alone();
  const auto violations = check_programs(plan, pipeline(plan, order));
  ASSERT_FALSE(violations.empty());
  // Both forward 2 and backward 0 are the n-th meeting of one group: the matching sees it first.
  expect_violation(violations, "rendezvous", {"slot 2", "slot 0"});
}

TEST(VerifyPrograms, CrossedMeetingsAreACycle) {
  // Two groups met in opposite order: {0, 1} and a tensor meeting of the same ranks.
  const StepPlan plan = hand_made_plan();
  auto programs = compile(plan, {});
  const Rendezvous extra{RendezvousKind::kTensor, RankList{0, 2}, 1};
  programs[0].instructions[1].rendezvous.insert(programs[0].instructions[1].rendezvous.begin(),
                                                extra);
  programs[2].instructions[1].rendezvous.push_back(extra);
  expect_violation(check_programs(plan, programs), "deadlock",
                   {"[2, 0, 3]", "[0, 2]", "slot 0", "waits for", "sample 10"});
}

TEST(VerifyPrograms, SendWithoutReceiveIsNamed) {
  const std::vector<std::vector<std::vector<Action>>> order = {
      {{{kF, 0}, {kB, 0}, {kF, 2}, {kB, 2}},
       {{kF, 0}, {kB, 0}, {kF, 1}, {kB, 1}, {kF, 2}, {kB, 2}}},
      {{{kF, 0}, {kB, 0}, {kF, 2}, {kB, 2}},
       {{kF, 0}, {kB, 0}, {kF, 1}, {kB, 1}, {kF, 2}, {kB, 2}}}};
  const StepPlan plan = shared_and_alone();
  const auto good = pipeline(plan, order);
  EXPECT_EQ(all_text(check_programs(plan, good)), "");
  const auto find = [](const Program& program, Op op, int slot) {
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      if (program.instructions[i].op == op && program.instructions[i].slot == slot) return i;
    }
    return program.instructions.size();
  };
  auto programs = good;
  erase(programs[3], find(programs[3], Op::kReceive, 2));
  expect_violation(check_programs(plan, programs), "transfer",
                   {"rank 1", "send", "slot 2", "meets no receive on rank 3"});
  expect_violation(check_programs(plan, programs), "order",
                   {"rank 3", "before its activation is received"});
  programs = good;
  erase(programs[1], find(programs[1], Op::kSend, 2));
  expect_violation(check_programs(plan, programs), "transfer",
                   {"rank 3", "receive", "slot 2", "meets no send on rank 1"});
  programs = good;
  programs[1].instructions[find(programs[1], Op::kSend, 1)].slot = 0;
  expect_violation(check_programs(plan, programs), "transfer",
                   {"rank 1", "expects the activation of slot 1"});
  programs = good;
  programs[1].instructions[find(programs[1], Op::kSend, 1)].peer = 2;
  expect_violation(check_programs(plan, programs), "transfer", {"rank 1", "peer 2"});
  programs = good;
  for (auto& program : programs) {
    std::erase_if(program.instructions,
                  [](const Instruction& i) { return i.op == Op::kSend || i.op == Op::kReceive; });
  }
  expect_violation(check_programs(plan, programs), "pipeline", {"1 of the model's 2 pieces"});
}

// Stage 0 waits for a gradient whose activation it only sends afterwards.
TEST(VerifyPrograms, TransferBeforeItsCauseIsACycle) {
  StepPlan plan = shared_and_alone();
  plan.slots.resize(1);
  plan.samples.resize(1);
  predict_(plan);
  const std::vector<std::vector<std::vector<Action>>> order = {
      {{{kF, 0}, {kB, 0}}, {{kF, 0}, {kB, 0}}}, {{{kF, 0}, {kB, 0}}, {{kF, 0}, {kB, 0}}}};
  auto programs = pipeline(plan, order);
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");
  // load, forward, send, receive, backward: put a rendezvous wall between receive and send.
  auto& first = programs[0].instructions;
  ASSERT_EQ(first[2].op, Op::kSend);
  ASSERT_EQ(first[3].op, Op::kReceive);
  std::swap(first[2], first[3]);
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");  // posted together: no matter
  std::swap(first[3], first[4]);                            // receive, backward, send
  expect_violation(check_programs(plan, programs), "deadlock", {"rank 0", "rank 2", "slot 0"});
}

TEST(VerifyPrograms, DeferredWeightGradientMustFollow) {
  expect_violation(
      programs_after([](auto& p) { p[3].instructions[2].defer_weight_gradient = true; }),
      "conservation", {"rank 3", "weight_gradient happens 0 times"});
  EXPECT_EQ(all_text(programs_after([](auto& p) {
              p[3].instructions[2].defer_weight_gradient = true;
              p[3].instructions.insert(
                  p[3].instructions.begin() + 3,
                  Instruction{.op = Op::kWeightGradient, .slot = 0, .unit = 0});
            })),
            "");
}

TEST(VerifyMemory, FollowsWhatAScheduleKeeps) {
  auto problem =
      PlanProblem::from_lengths(std::vector<std::int64_t>(16, 100), {.hdp = 2, .pp = 4}, 100);
  const StepPlan plan = make_plan(problem, "naive_hdp");  // 8 slots of full units
  const auto keeps = [&](const CompileOptions& options, double tokens) {
    return all_text(check_memory(plan, compile(plan, options), tokens));
  };
  for (const char* schedule : {"1f1b", "zb_h1"}) {
    EXPECT_EQ(keeps({.layers = 4, .schedule = schedule}, 100.0), "") << schedule;
    EXPECT_NE(keeps({.layers = 4, .schedule = schedule}, 99.0), "") << schedule;
  }
  // All forwards before all backwards: eight quarters of a unit.
  auto table = std::make_shared<Schedule>();
  table->stages.resize(4);
  for (int stage = 0; stage < 4; ++stage) table->placement.push_back({.stage = stage, .chunk = 0});
  for (auto& stage : table->stages) {
    for (const Op op : {Op::kForward, Op::kBackward}) {
      for (int slot = 0; slot < 8; ++slot) stage.push_back({.op = op, .slot = slot});
    }
  }
  EXPECT_EQ(keeps({.layers = 4, .table = table}, 200.0), "");
  const std::string text = keeps({.layers = 4, .table = table}, 150.0);
  EXPECT_NE(text.find("activations of 175 tokens"), std::string::npos) << text;
  EXPECT_NE(text.find("slot 6"), std::string::npos) << text;
  // Programs that free what they do not have, or keep what they saved.
  auto programs = compile(plan, {.layers = 4});
  std::erase_if(programs[0].instructions,
                [](const Instruction& at) { return at.op == Op::kBackward && at.slot == 3; });
  std::erase_if(programs[1].instructions,
                [](const Instruction& at) { return at.op == Op::kForward && at.slot == 2; });
  const std::string broken = all_text(check_memory(plan, programs, 1e9));
  EXPECT_NE(broken.find("rank 0: activations of slot 3"), std::string::npos) << broken;
  EXPECT_NE(broken.find("were not saved"), std::string::npos) << broken;
}

TEST(VerifyPrograms, ManyShapesCompileToValidPrograms) {
  for (const int hdp : {1, 2, 3, 4, 5, 7, 8, 12}) {
    for (const Lockstep lockstep : {Lockstep::kNone, Lockstep::kEp, Lockstep::kHdp}) {
      for (const int tp : {1, 2}) {
        for (const char* strategy : {"static", "naive_hdp"}) {
          auto problem =
              PlanProblem::from_lengths(testing::mixed_lengths(60, 500 * hdp, hdp),
                                        {.tp = tp, .hdp = hdp, .ep = hdp % 2 ? 1 : 2}, 1000);
          problem.lockstep = lockstep;
          const StepPlan plan = make_plan(problem, strategy);
          ASSERT_EQ(all_text(check_programs(plan, compile(plan, {.layers = 3}))), "")
              << strategy << " hdp " << hdp << " tp " << tp;
        }
      }
    }
  }
}

}  // namespace
}  // namespace meshloom::plan
