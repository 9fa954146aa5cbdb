#include "meshloom/sim/simulator.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "meshloom/plan/program.h"
#include "meshloom/plan/schedule.h"
#include "meshloom/plan/step_time.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::sim {
namespace {

// Sums of at most some thousand doubles.
constexpr double kRounding = 1e-9;

/// A machine on which only computation takes time.
Cluster free_communication() {
  Cluster cluster;
  cluster.inside = cluster.between = cluster.host = {.bandwidth = 1e30, .latency = 0.0};
  return cluster;
}

Workload unit_workload(double weight_share) {
  Workload workload;
  workload.layers = 8;
  workload.seconds_per_work = 1.0;
  workload.forward_share = 1.0 / 3.0;
  workload.weight_gradient_share = weight_share;
  return workload;
}

/// `slots` equal micro-batches of work 3 on every HDP rank, so that a stage of p takes 1/p forward.
plan::StepPlan equal_slots(int stages, int chunks, int slots) {
  plan::StepPlan plan;
  plan.layout.pp = stages;
  plan.layout.chunks = chunks;
  plan.capacity_tokens = 1;
  plan.cost = {.quadratic = 0.0, .linear = 3.0 * stages, .fixed = 0.0, .exchange = 0.0};
  for (int i = 0; i < slots; ++i) {
    plan.samples.push_back({.id = i, .tokens = 1, .loss_tokens = 0});
    plan.slots.push_back({.units = {{.ranks = {0}, .samples = {i}}}});
  }
  plan::predict_(plan);
  return plan;
}

double step_time(const std::string& schedule, int stages, int chunks, int slots) {
  const auto plan = equal_slots(stages, chunks, slots);
  const auto programs = plan::compile(plan, {.layers = 8 * chunks, .schedule = schedule});
  const auto violations = plan::check_programs(plan, programs);
  EXPECT_TRUE(violations.empty()) << schedule << ": " << violations.front().message;
  return simulate(plan, programs, free_communication(), unit_workload(1.0 / 3.0)).step_time;
}

int chunks_of(const std::string& schedule) {
  return schedule == "interleaved_1f1b" || schedule == "zb_v" ? 2 : 1;
}

// With forward F = 1, whole backward B = 2, weight gradient W = 1 for all chunks of a stage.
TEST(Simulator, BubblesOfSchedulesAreTheirFormulas) {
  for (const int stages : {2, 4, 8}) {
    for (const int slots : {8, 16, 24}) {
      const double ideal = 3.0 * slots;
      EXPECT_NEAR(step_time("1f1b", stages, 1, slots), ideal + 3.0 * (stages - 1), kRounding);
      EXPECT_NEAR(step_time("zb_h1", stages, 1, slots), ideal + (1.0 + 2.0 - 2.0) * (stages - 1),
                  kRounding);
      for (const int chunks : {2, 3}) {
        EXPECT_NEAR(step_time("interleaved_1f1b", stages, chunks, slots),
                    ideal + 3.0 / chunks * (stages - 1), kRounding);
      }
      // Zero bubble: the last stage waits for the first half forwards, then nobody waits.
      if (slots >= 2 * stages) {
        EXPECT_NEAR(step_time("zb_v", stages, 2, slots), ideal + 0.5 * (stages - 1), kRounding);
      }
    }
  }
}

TEST(Simulator, EveryScheduleEndsForAnyNumberOfSlots) {
  for (const auto& schedule : plan::schedule_names()) {
    for (const int stages : {1, 2, 3, 5}) {
      for (int slots = 1; slots <= 7; ++slots) {
        EXPECT_GE(step_time(schedule, stages, chunks_of(schedule), slots), 3.0 * slots - kRounding)
            << schedule << " " << stages << " stages, " << slots << " slots";
      }
    }
  }
}

TEST(Simulator, RanksWithoutAPartInSomeSlotsStillMeet) {
  for (const auto& schedule : plan::schedule_names()) {
    for (int hdp = 2; hdp <= 6; ++hdp) {
      for (const auto lockstep :
           {plan::Lockstep::kNone, plan::Lockstep::kEp, plan::Lockstep::kHdp}) {
        plan::PlanProblem problem;
        problem.layout.hdp = hdp;
        problem.layout.pp = 1 + hdp % 4;
        problem.layout.chunks = chunks_of(schedule);
        problem.layout.ep = lockstep == plan::Lockstep::kEp && hdp % 2 == 0 ? 2 : 1;
        problem.lockstep = lockstep;
        problem.capacity_tokens = 100;
        for (int i = 0; i < 25; ++i) {
          const std::int64_t tokens = 1 + (i * i * 37 + 11 * hdp) % (40 * hdp);
          problem.samples.push_back({.id = i, .tokens = tokens, .loss_tokens = tokens - 1});
        }
        const auto plan = plan::make_plan(problem, "balanced");
        const auto programs = plan::compile(plan, {.layers = 12, .schedule = schedule});
        const auto violations = plan::check_programs(plan, programs);
        ASSERT_TRUE(violations.empty()) << schedule << ": " << violations.front().message;
        const auto result =
            simulate(plan, programs, free_communication(), unit_workload(1.0 / 3.0));
        EXPECT_GE(result.step_time * problem.layout.pp,
                  plan.predicted.lower_bound * (1.0 - kRounding))
            << schedule;
        const double predicted = plan::step_time(plan, schedule);
        EXPECT_NEAR(result.step_time, predicted, kRounding * predicted) << schedule << " " << hdp;
      }
    }
  }
}

TEST(Simulator, WithoutAPipelineTheStepIsThePredictedMakespan) {
  plan::PlanProblem problem;
  problem.layout.hdp = 5;
  problem.capacity_tokens = 100;
  for (int i = 0; i < 30; ++i) {
    const std::int64_t tokens = 1 + (i * i * 17) % 300;
    problem.samples.push_back({.id = i, .tokens = tokens, .loss_tokens = tokens - 1});
  }
  for (const char* strategy : {"static", "naive_hdp", "balanced"}) {
    const auto plan = plan::make_plan(problem, strategy);
    const auto programs = plan::compile(plan, {.layers = 8});
    const auto result = simulate(plan, programs, free_communication(), unit_workload(1.0 / 3.0));
    EXPECT_NEAR(result.step_time, plan.predicted.makespan, kRounding * plan.predicted.makespan)
        << strategy;
  }
}

TEST(Simulator, ExposesOnlyTransferBeyondComputation) {
  plan::PlanProblem problem;
  problem.layout.hdp = 4;
  problem.capacity_tokens = 1024;
  problem.cost = {.quadratic = 1e-6, .linear = 0.0, .fixed = 0.0, .exchange = 0.0};
  problem.samples = {{.id = 0, .tokens = 4096, .loss_tokens = 4095}};
  const auto plan = plan::make_plan(problem, "naive_hdp");
  const auto programs = plan::compile(plan, {.layers = 8});
  auto cluster = free_communication();
  auto workload = unit_workload(1.0 / 3.0);
  workload.parameter_bytes = workload.gradient_bytes = 0.0;
  EXPECT_NEAR(simulate(plan, programs, cluster, workload).exposed[0], 0.0, kRounding);
  // A block of keys and values: 1,024 tokens of 2 * 8 * 128 values of two bytes, their gradients of
  // four. Keys take twice as long as a forward ring step of attention.
  const double attention = 1e-6 * 4096.0 * 4096.0 / 4 / 3 / 8 / 4;
  constexpr double kBlock = 1024.0 * 2 * 8 * 128 * 2;
  cluster.inside.bandwidth = kBlock / (2.0 * attention);
  const auto slow = simulate(plan, programs, cluster, workload);
  // Forward: 3 calls that show half. Backward, whose steps compute twice as long, counted in
  // attention: keys 2 beside half of the own block 1; keys 2 beside 2; keys and gradients 6 beside
  // 2; gradients 4 beside 2; gradients 4 beside the other half 1.
  EXPECT_NEAR(slow.exposed[0], 8 * (3 + 1 + 0 + 4 + 2 + 3) * attention, 1e-3 * attention);
  EXPECT_EQ(slow.bytes_between, 0.0);
  // All others need the first half of the document, and m members chunk 7 - m: 1.5 blocks a pair.
  const double rows_in_blocks = 4.0 * 3 / 2 * 1.5;
  EXPECT_NEAR(slow.bytes_inside, 8 * rows_in_blocks * kBlock * (1 + 1 + 2), 1.0);
}

TEST(Simulator, UnitsOfASlotShareTheirNodesLink) {
  // Three rings of two ranks each across two nodes of three; keys and values are the only cost.
  plan::StepPlan plan;
  plan.layout.hdp = 6;
  plan.capacity_tokens = 100;
  plan.cost = {.quadratic = 0.0, .linear = 1e-12, .fixed = 0.0, .exchange = 0.0};
  plan.slots.resize(1);
  for (int i = 0; i < 3; ++i) {
    plan.samples.push_back({.id = i, .tokens = 200, .loss_tokens = 0});
    plan.slots[0].units.push_back(
        {.ranks = {i, i + 3}, .samples = {i}, .exchange = plan::Exchange::kRing});
  }
  plan::predict_(plan);
  const auto programs = plan::compile(plan, {.layers = 1});
  Workload workload = unit_workload(1.0 / 3.0);
  workload.layers = 1;
  // Keys and values of 10 bytes a token, gradients of as many.
  workload.attention = {.heads = 1,
                        .key_value_heads = 1,
                        .head_dim = 5,
                        .window = 0,
                        .element_bytes = 1,
                        .wire_bytes = 1,
                        .statistic_bytes = 1};
  workload.parameter_bytes = workload.gradient_bytes = 0.0;
  Cluster cluster = free_communication();
  cluster.ranks_per_node = 3;
  cluster.between = {.bandwidth = 1000.0, .latency = 0.0};
  // One ring step of 100 tokens: 1,000 bytes forward, twice that backward.
  EXPECT_NEAR(simulate(plan, programs, cluster, workload).step_time, 3.0, 1e-6);
  cluster.node_bandwidth = 3000.0;  // enough for the three
  EXPECT_NEAR(simulate(plan, programs, cluster, workload).step_time, 3.0, 1e-6);
  cluster.node_bandwidth = 1000.0;  // a third for each
  EXPECT_NEAR(simulate(plan, programs, cluster, workload).step_time, 9.0, 1e-6);
  plan.slots[0].units.resize(1);  // the others have nothing to send
  plan.samples.resize(1);
  EXPECT_NEAR(simulate(plan, plan::compile(plan, {.layers = 1}), cluster, workload).step_time, 3.0,
              1e-6);
}

TEST(Simulator, SavedActivationsPeakWithPipelineDepth) {
  const auto plan = equal_slots(4, 1, 16);
  const auto programs = plan::compile(plan, {.layers = 8});
  const auto workload = unit_workload(1.0 / 3.0);
  const auto result = simulate(plan, programs, free_communication(), workload);
  const double one = workload.saved_bytes * 2;  // layers of one stage, one token
  for (int stage = 0; stage < 4; ++stage) {
    EXPECT_NEAR(result.peak_memory[static_cast<std::size_t>(stage)], (4 - stage) * one, 1e-6);
  }
}

TEST(Simulator, NamesWhoWaitsWhereProgramsCannotEnd) {
  const auto plan = equal_slots(2, 1, 2);
  auto programs = plan::compile(plan, {.layers = 8});
  auto& first = programs[0].instructions;
  first.erase(std::find_if(first.begin(), first.end(),
                           [](const auto& i) { return i.op == plan::Op::kSend; }));
  try {
    (void)simulate(plan, programs, free_communication(), unit_workload(1.0 / 3.0));
    FAIL() << "a missing send went unnoticed";
  } catch (const PlanError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 at forward of slot 1 (nothing from rank 0)"),
              std::string::npos)
        << error.what();
  }
}

TEST(Simulator, UnevenStagesTakeTheirShares) {
  const auto plan = equal_slots(2, 1, 6);
  const auto programs = plan::compile(plan, {.layers = 8});
  auto workload = unit_workload(1.0 / 3.0);
  workload.stage_shares = {0.25, 0.75};
  const auto result = simulate(plan, programs, free_communication(), workload);
  EXPECT_NEAR(result.busy[0], 6 * 6.0 * 0.25, kRounding);
  EXPECT_NEAR(result.busy[1], 6 * 6.0 * 0.75, kRounding);
  // The slow stage works through, behind one forward and before one backward of the other.
  EXPECT_NEAR(result.step_time, 6 * 6.0 * 0.75 + 6.0 * 0.25, kRounding);
}

TEST(Simulator, ExpertsWorkGoesWhereTokensAreDispatchedTo) {
  plan::PlanProblem problem;
  problem.layout = {.hdp = 2, .ep = 2};
  problem.capacity_tokens = 100;
  problem.cost = {.quadratic = 0.0, .linear = 1.0, .fixed = 0.0, .exchange = 0.0};
  problem.samples = {{.id = 0, .tokens = 90, .loss_tokens = 89},
                     {.id = 1, .tokens = 30, .loss_tokens = 29}};
  const auto plan = plan::make_plan(problem, "naive_hdp");
  const auto programs = plan::compile(plan, {.layers = 8});
  auto workload = unit_workload(1.0 / 3.0);
  workload.expert_share = 0.5;
  const auto result = simulate(plan, programs, free_communication(), workload);
  const double most = std::max(result.busy[0], result.busy[1]);
  EXPECT_NEAR(most, 0.5 * 90 + 0.5 * 60, kRounding);
  EXPECT_NEAR(result.busy[0] + result.busy[1], 120.0, kRounding);
  EXPECT_NEAR(result.step_time, most, kRounding);
}

/// One slot in lockstep over four ranks: what ZeRO 2 or 3 move, and what of it shows.
Simulation sharded(int zero, double overlap, double bandwidth) {
  plan::PlanProblem problem;
  problem.layout.hdp = 4;
  problem.lockstep = plan::Lockstep::kHdp;
  problem.capacity_tokens = 10;
  problem.cost = {.quadratic = 0.0, .linear = 1.0, .fixed = 0.0, .exchange = 0.0};
  for (int i = 0; i < 4; ++i) problem.samples.push_back({.id = i, .tokens = 9, .loss_tokens = 8});
  const auto plan = plan::make_plan(problem, "naive_hdp");
  auto cluster = free_communication();
  cluster.inside.bandwidth = bandwidth;
  cluster.overlap = overlap;
  auto workload = unit_workload(1.0 / 3.0);
  workload.parameter_bytes = 800.0;
  workload.gradient_bytes = 1600.0;
  workload.zero = zero;
  return simulate(plan, plan::compile(plan, {.layers = 8}), cluster, workload);
}

TEST(Simulator, ShardedStatesTravelBesideLayers) {
  const double parameters = 800.0 * 3 / 4;
  const double gradients = 1600.0 * 3 / 4;
  constexpr double kBandwidth = 1000.0;  // a pass moves less than it computes
  EXPECT_NEAR(sharded(2, 1.0, kBandwidth).bytes_inside, 4 * (gradients + parameters), kRounding);
  EXPECT_NEAR(sharded(3, 1.0, kBandwidth).bytes_inside, 4 * (gradients + 2 * parameters),
              kRounding);
  // Of eight layers one has nothing to hide behind; nothing hides where nothing overlaps.
  EXPECT_NEAR(sharded(3, 1.0, kBandwidth).exposed[0], (gradients + 2 * parameters) / kBandwidth / 8,
              kRounding);
  EXPECT_NEAR(sharded(3, 0.0, kBandwidth).exposed[0], (gradients + 2 * parameters) / kBandwidth,
              kRounding);
  // ZeRO 2 gathers updated parameters at the end.
  EXPECT_NEAR(sharded(2, 1.0, kBandwidth).exposed[0],
              gradients / kBandwidth / 8 + parameters / kBandwidth, kRounding);
}

TEST(Simulator, GradientsMeetThoseWhoHoldThem) {
  for (const int ep : {1, 2, 4}) {
    plan::PlanProblem problem;
    problem.layout = {.hdp = 4, .ep = ep};
    problem.capacity_tokens = 10;
    problem.samples = {{.id = 0, .tokens = 9, .loss_tokens = 8}};
    const auto plan = plan::make_plan(problem, "naive_hdp");
    auto workload = unit_workload(1.0 / 3.0);
    workload.gradient_bytes = 400.0;
    workload.expert_gradient_bytes = 3200.0;
    workload.parameter_bytes = 0.0;
    const auto result =
        simulate(plan, plan::compile(plan, {.layers = 8}), free_communication(), workload);
    const double replicas = 4.0 / ep;
    const double own = 400.0 * 3 / 4 + 3200.0 / ep * (replicas - 1) / replicas;
    EXPECT_NEAR(result.bytes_inside, 4 * own, kRounding) << ep;
  }
}

TEST(Simulator, RowsOfTensorRanksAreThoseOfTheClosedForms) {
  plan::PlanProblem problem;
  problem.layout.tp = 2;
  problem.capacity_tokens = 100;
  problem.samples = {{.id = 0, .tokens = 100, .loss_tokens = 99}};
  const auto plan = plan::make_plan(problem, "naive_hdp");
  auto workload = unit_workload(1.0 / 3.0);
  workload.hidden_bytes = 10.0;
  const auto result =
      simulate(plan, plan::compile(plan, {.layers = 8}), free_communication(), workload);
  EXPECT_NEAR(result.bytes_inside, 2 * (100 / 2) * 10.0 * (8 * 10 + 4), kRounding);
}

TEST(Cluster, YamlIsReadStrictly) {
  const auto cluster = Cluster::from_yaml(
      "ranks_per_node: 4\ninside: {bandwidth: 3.0e11, latency: 2.0e-6}\n", "c.yaml");
  EXPECT_EQ(cluster.ranks_per_node, 4);
  EXPECT_EQ(cluster.inside.bandwidth, 3e11);
  for (const char* bad : {"racks: 3", "inside: {bandwidth: fast}", "inside: 3", "[1]", "a: [",
                          "inside: {bandwidth: 0, latency: 0}", "ranks_per_node: 0",
                          "slow_ranks: {3: 0}", "compute_rate: .nan", "nodes: -1", "overlap: 2"}) {
    EXPECT_THROW((void)Cluster::from_yaml(bad, "c.yaml"), DataError) << bad;
  }
}

TEST(Workload, YamlOverridesFields) {
  const std::string text = "workload: {layers: 12, dispatch_bytes: 64}\nranks_per_node: 2\n";
  EXPECT_EQ(Cluster::from_yaml(text, "c.yaml").ranks_per_node, 2);
  const auto workload = Workload::from_yaml(text, "c.yaml", Workload::llama_7b());
  EXPECT_EQ(workload.layers, 12);
  EXPECT_EQ(workload.dispatch_bytes, 64.0);
  EXPECT_EQ(workload.hidden_bytes, Workload::llama_7b().hidden_bytes);
  for (const char* bad :
       {"workload: {layer: 3}", "workload: {layers: 0}", "workload: 3",
        "workload: {seconds_per_work: 0}", "workload: {forward_share: 0.9}", "workload: {zero: 4}",
        "workload: {recompute: some}", "workload: {expert_share: 2}"}) {
    EXPECT_THROW((void)Workload::from_yaml(bad, "c.yaml", Workload{}), DataError) << bad;
  }
}

TEST(Simulator, SlowRankHoldsUpWhoWaitsForIt) {
  plan::PlanProblem problem;
  problem.layout.hdp = 2;
  problem.capacity_tokens = 10;
  problem.cost = {.quadratic = 0.0, .linear = 1.0, .fixed = 0.0, .exchange = 0.0};
  problem.samples = {{.id = 0, .tokens = 10, .loss_tokens = 9},
                     {.id = 1, .tokens = 10, .loss_tokens = 9}};
  const auto plan = plan::make_plan(problem, "naive_hdp");
  const auto programs = plan::compile(plan, {.layers = 8});
  auto cluster = free_communication();
  cluster.slow_ranks[1] = 0.5;
  const auto result = simulate(plan, programs, cluster, unit_workload(1.0 / 3.0));
  EXPECT_NEAR(result.busy[0], 10.0, kRounding);
  EXPECT_NEAR(result.busy[1], 20.0, kRounding);
  EXPECT_NEAR(result.finish[0], 20.0, kRounding);  // the gradients meet
}

TEST(Workload, SevenBillionParametersTakeThePublishedTimes) {
  // [BS fig. 6(a)], ms a layer forward: attention and MLP.
  const double published[][3] = {{4096, 0.8, 0.9},   {8192, 1.8, 1.8},    {16384, 4.8, 3.6},
                                 {32768, 14.1, 7.5}, {65536, 48.2, 15.1}, {131072, 175.5, 28.2}};
  constexpr double kFigureTolerance = 0.05;  // what the fit leaves, and digits read off a figure
  const auto cost = Workload::llama_7b_cost();
  for (const auto& row : published) {
    const double s = row[0] / 1.024;  // the figure counts 1K = 1,024, the fit thousands
    const double ms = cost.work(static_cast<std::int64_t>(s)) / (32 * 3) * 1e3;
    EXPECT_NEAR(ms, row[1] + row[2], kFigureTolerance * (row[1] + row[2])) << row[0];
  }
}

}  // namespace
}  // namespace meshloom::sim
