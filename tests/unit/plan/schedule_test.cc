#include "meshloom/plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::all_text;

int chunks_of(const std::string& schedule) {
  return schedule == "interleaved_1f1b" || schedule == "zb_v" ? 2 : 1;
}

/// A plan whose units hold random rank sets, so that ranks have parts in different slots.
StepPlan ragged_plan(std::uint64_t seed, const std::string& schedule) {
  const std::uint64_t key = random_key("ragged", seed);
  std::uint64_t next = 0;
  const auto below = [&](int n) {
    return static_cast<int>(random_bits(key, next++) % static_cast<std::uint64_t>(n));
  };
  StepPlan plan;
  plan.layout.hdp = 1 + below(6);
  plan.layout.pp = 1 + below(5);
  plan.layout.tp = 1 + below(2);
  plan.layout.chunks = chunks_of(schedule);
  if (plan.layout.hdp % 2 == 0 && below(2)) plan.layout.ep = 2;
  plan.lockstep = plan.layout.ep > 1 ? Lockstep::kEp : below(3) ? Lockstep::kNone : Lockstep::kHdp;
  plan.capacity_tokens = 100;
  const int slots = 1 + below(9);
  std::int64_t id = 0;
  for (int s = 0; s < slots; ++s) {
    Slot slot;
    std::vector<int> ranks;
    for (int r = 0; r < plan.layout.hdp; ++r) {
      if (s == 0 || below(3)) ranks.push_back(r);
    }
    while (!ranks.empty()) {
      Unit unit;
      for (int degree = 1 + below(3); degree > 0 && !ranks.empty(); --degree) {
        const int at = below(static_cast<int>(ranks.size()));
        unit.ranks.push_back(ranks[static_cast<std::size_t>(at)]);
        ranks.erase(ranks.begin() + at);
      }
      unit.exchange = unit.ranks.size() > 1 ? Exchange::kRing : Exchange::kLocal;
      unit.samples = {id};
      plan.samples.push_back({id++, 1 + below(90), 1});
      slot.units.push_back(std::move(unit));
    }
    if (!slot.units.empty()) plan.slots.push_back(std::move(slot));
  }
  predict_(plan);
  return plan;
}

TEST(Schedule, ProgramsOfRaggedPlansAreSound) {
  for (const std::string& schedule : schedule_names()) {
    for (std::uint64_t seed = 0; seed < 100; ++seed) {
      const StepPlan plan = ragged_plan(seed, schedule);
      const auto programs = compile(plan, {.layers = 10, .schedule = schedule});
      ASSERT_EQ(all_text(check_programs(plan, programs)), "") << schedule << " seed " << seed;
    }
  }
}

TEST(Schedule, ReceivesSwappedOnOneRankAreFound) {
  const Layout layout{.pp = 2};
  StepPlan plan = make_plan(PlanProblem::from_lengths({5, 5, 5}, layout, 5), "naive_hdp");
  auto programs = compile(plan, {.layers = 2});
  auto& mine = programs[1].instructions;
  std::vector<std::size_t> receives;
  for (std::size_t i = 0; i < mine.size(); ++i) {
    if (mine[i].op == Op::kReceive) receives.push_back(i);
  }
  ASSERT_GE(receives.size(), 2U);
  std::swap(mine[receives[0]], mine[receives[1]]);
  EXPECT_NE(all_text(check_programs(plan, programs)), "");
}

TEST(Schedule, OwnTableGivesTheProgramsOfItsLike) {
  const StepPlan plan = ragged_plan(3, "zb_v");
  const auto slots = static_cast<int>(plan.slots.size());
  CompileOptions options{.layers = 10, .schedule = "zb_v"};
  const auto built_in = compile(plan, options);
  options.table = std::make_shared<Schedule>(make_schedule("zb_v", plan.layout, slots));
  options.schedule = "ignored";
  EXPECT_EQ(compile(plan, options), built_in);
}

TEST(Schedule, OwnTableOfAllForwardsFirstIsCarriedOut) {
  const Layout layout{.pp = 3};
  const StepPlan plan = make_plan(PlanProblem::from_lengths({5, 5, 5, 5}, layout, 5), "naive_hdp");
  Schedule table;
  for (int stage = 0; stage < 3; ++stage) {
    table.placement.push_back({stage, 0});
    auto& order = table.stages.emplace_back();
    for (int slot = 0; slot < 4; ++slot) order.push_back({.op = Op::kForward, .slot = slot});
    for (int slot = 3; slot >= 0; --slot) order.push_back({.op = Op::kBackward, .slot = slot});
  }
  const auto programs =
      compile(plan, {.layers = 3, .table = std::make_shared<Schedule>(std::move(table))});
  EXPECT_EQ(all_text(check_programs(plan, programs)), "");
}

TEST(Schedule, TablesThatCannotBeCarriedOutAreRefused) {
  const Layout layout{.pp = 2};
  struct Case {
    const char* says;
    std::function<void(Schedule&)> spoil;
  };
  const std::vector<Case> cases{
      {"stage 1: backward of chunk 0, slot 1 is missing",
       [](Schedule& table) { table.stages[1].pop_back(); }},
      {"is listed twice",
       [](Schedule& table) { table.stages[0].push_back(table.stages[0].front()); }},
      {"comes before its forward",
       [](Schedule& table) { std::swap(table.stages[1][0], table.stages[1][1]); }},
      {"expected chunks 0 .. 0 and slots 0 .. 1",
       [](Schedule& table) { table.stages[0][0].slot = 2; }},
      {"tables list computations alone",
       [](Schedule& table) { table.stages[0][0].op = Op::kSend; }},
      {"weight_gradient of chunk 0, slot 0 is missing",
       [](Schedule& table) { table.stages[1][1].defer_weight_gradient = true; }},
      {"are both stage 0, chunk 0",
       [](Schedule& table) {
         table.placement[1] = {0, 0};
       }},
      // Stage 0 wants slot 0's gradient before it sends slot 1, which stage 1 wants first.
      {"wait for each other: stage 0: backward of chunk 0, slot 0; stage 1: forward of chunk 0, "
       "slot 1",
       [](Schedule& table) {
         table.stages[0] = {{.op = Op::kForward, .slot = 0},
                            {.op = Op::kBackward, .slot = 0},
                            {.op = Op::kForward, .slot = 1},
                            {.op = Op::kBackward, .slot = 1}};
         table.stages[1] = {{.op = Op::kForward, .slot = 1},
                            {.op = Op::kForward, .slot = 0},
                            {.op = Op::kBackward, .slot = 0},
                            {.op = Op::kBackward, .slot = 1}};
       }},
  };
  for (const Case& one : cases) {
    Schedule table = make_schedule("1f1b", layout, 2);
    EXPECT_NO_THROW(check_schedule(table, layout, 2));
    one.spoil(table);
    try {
      check_schedule(table, layout, 2);
      ADD_FAILURE() << "accepted: " << one.says;
    } catch (const PlanError& error) {
      EXPECT_NE(std::string(error.what()).find(one.says), std::string::npos) << error.what();
    }
  }
}

TEST(Schedule, NamesAndChunksAreChecked) {
  EXPECT_THROW((void)make_schedule("gpipe", {.pp = 2}, 3), NotSupported);
  EXPECT_THROW((void)make_schedule("zb_v", {.pp = 2}, 3), InvalidArgument);
  EXPECT_THROW((void)make_schedule("1f1b", {.pp = 2, .chunks = 2}, 3), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::plan
