// Where a step's bytes and time went, as the trainer tells it.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/trainer.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::explain {
namespace {

using plan::Op;

/// Planted time of forward or backward of a token, far above the tiny model's own.
constexpr std::chrono::microseconds kTokenTime{400};
/// Planted slowness of one rank.
constexpr double kFactor = 2.0;
/// Sleeping and a loaded machine add to planted times, never take from them.
constexpr double kTimeScatter = 0.2;

/// Metrics of every step and the notices, as rank 0 sees them.
struct Told {
  std::vector<StepMetrics> steps;
  std::vector<std::string> notices;
};

/// A run in which computing takes a planted time a token, times `factor` of the rank.
Told planted(const TrainConfig& config, const std::vector<double>& factor,
             const std::shared_ptr<plan::BalanceStrategy>& strategy) {
  Told told;
  comm::run_thread_ranks(static_cast<int>(factor.size()), [&](comm::Communicator world) {
    const Trainer* running = nullptr;
    TrainerHooks hooks;
    hooks.before = [&](const plan::Instruction& instruction) {
      if (instruction.unit < 0) return;
      if (instruction.op != Op::kForward && instruction.op != Op::kBackward) return;
      const plan::StepPlan& plan = running->last_plan();
      const plan::Unit& unit = plan.slots[static_cast<std::size_t>(instruction.slot)]
                                   .units[static_cast<std::size_t>(instruction.unit)];
      double tokens = 0.0;
      for (const plan::SampleInfo& sample : plan.samples) {
        if (std::count(unit.samples.begin(), unit.samples.end(), sample.id) > 0) {
          tokens += static_cast<double>(sample.tokens) / static_cast<double>(unit.ranks.size());
        }
      }
      std::this_thread::sleep_for(kTokenTime * tokens *
                                  factor[static_cast<std::size_t>(world.rank())]);
    };
    Trainer trainer(config, tiny_dense(), tiny_loader(), world, strategy, hooks);
    running = &trainer;
    while (!trainer.finished()) {
      const StepMetrics metrics = trainer.step();
      if (world.rank() == 0) told.steps.push_back(metrics);
    }
    if (world.rank() == 0) told.notices = trainer.notices();
  });
  return told;
}

TEST(Explain, SlowHardwareIsToldFromData) {
  const TemporaryFolder folder;
  const Told told =
      planted(tiny_config(folder.file("run"), 12), {1.0, kFactor, 1.0}, /*strategy=*/nullptr);
  double planned_time = 0.0;
  double hardware = 0.0;
  double data = 0.0;
  double waiting = 0.0;
  int slowest = 0;
  for (const StepMetrics& step : told.steps) {
    ASSERT_EQ(step.ranks.size(), 3U);
    planned_time += step.ranks[1].planned;
    hardware += step.extra.at("slow_hardware_seconds");
    data += step.extra.at("slow_data_seconds");
    waiting += step.extra.at("waiting_seconds");
    slowest += step.extra.at("slowest_rank") == 1.0;
  }
  EXPECT_GE(slowest, 9);  // of 12
  EXPECT_GT(hardware, 0.5 * planned_time);
  EXPECT_LT(std::abs(data), 0.25 * planned_time);
  EXPECT_GT(waiting, 0.2 * planned_time);
  ASSERT_EQ(told.notices.size(), 1U);
  EXPECT_NE(told.notices[0].find("rank 1 took"), std::string::npos) << told.notices[0];
  EXPECT_NE(told.notices[0].find("slow hardware"), std::string::npos) << told.notices[0];
}

TEST(Explain, UnequalDataIsToldFromHardware) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 12);
  config.capacity_tokens = 128;
  // Rank 0 takes every document of a step but two.
  const auto greedy = plan::make_strategy([](const plan::PlanProblem& problem) {
    std::vector<plan::Unit> units;
    for (const plan::SampleInfo& sample : problem.samples) {
      const int rank = static_cast<int>(units.size()) < 2 ? static_cast<int>(units.size()) + 1 : 0;
      units.push_back({.ranks = {rank}, .samples = {sample.id}});
    }
    return plan::into_slots(std::move(units), problem.layout.hdp);
  });
  const Told told = planted(config, {1.0, 1.0, 1.0}, greedy);
  double data = 0.0;
  double hardware = 0.0;
  for (const StepMetrics& step : told.steps) {
    data += step.extra.at("slow_data_seconds");
    hardware += std::abs(step.extra.at("slow_hardware_seconds"));
  }
  EXPECT_GT(data, 3.0 * hardware);
  ASSERT_FALSE(told.notices.empty());
  for (const std::string& notice : told.notices) {
    EXPECT_NE(notice.find("rank 0 was the slowest because its plans held"), std::string::npos)
        << notice;
  }
}

TEST(Explain, RankTimesAreThePlantedOnes) {
  const TemporaryFolder folder;
  const Told told = planted(tiny_config(folder.file("run"), 3), {1.0, kFactor}, nullptr);
  for (const StepMetrics& step : told.steps) {
    double least = 0.0;
    for (std::size_t r = 0; r < 2; ++r) {
      EXPECT_GT(step.ranks[r].busy, 0.0);
      EXPECT_GE(step.ranks[r].exposed, 0.0);
      EXPECT_LE(step.ranks[r].busy + step.ranks[r].exposed, step.seconds * (1.0 + kTimeScatter));
      least += step.ranks[r].busy / (r == 1 ? kFactor : 1.0);
    }
    const std::chrono::duration<double> planted_time = 2.0 * kTokenTime * step.tokens;
    EXPECT_GE(least, planted_time.count());
    EXPECT_GT(step.extra.at("exposed_seconds"), 0.0);
    EXPECT_GE(step.extra.at("hidden_seconds"), 0.0);
  }
}

TEST(Explain, BytesOfAStepAddUpByKindGroupPeerAndLink) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 4);
  config.layout = Layout{.hdp = 4, .ep = 2};
  std::map<std::string, std::int64_t> kinds;
  std::int64_t exchanged = 0;
  comm::run_thread_ranks(4, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_moe(), tiny_loader(), world);
    std::map<std::string, std::int64_t> sent;
    trainer.run([&](const StepMetrics& step) {
      std::int64_t all = 0;
      for (const auto& [kind, traffic] : step.traffic) {
        EXPECT_EQ(traffic.between_bytes, 0) << "threads share a host";
        EXPECT_GE(traffic.seconds, 0.0);
        all += traffic.inside_bytes;
        sent[kind] += traffic.inside_bytes;
      }
      std::int64_t grouped = 0;
      for (const auto& [group, bytes] : step.group_bytes) grouped += bytes;
      EXPECT_EQ(grouped, all);
      const auto exchange = step.traffic.find("exchange");
      EXPECT_EQ(exchange == step.traffic.end() ? 0 : exchange->second.inside_bytes,
                step.exchange_bytes);
      if (world.rank() == 0) exchanged += step.exchange_bytes;
    });
    if (world.rank() == 0) kinds = sent;
  });
  EXPECT_GT(exchanged, 0);
  for (const char* kind : {"exchange", "dispatch", "gradients", "parameters"}) {
    EXPECT_GT(kinds[kind], 0) << kind;
  }
  // The file has what the steps had, and what was moved between them, by sender and receiver.
  std::ifstream file(folder.file("run/traffic.json"));
  const auto traffic = nlohmann::json::parse(file);
  EXPECT_EQ(traffic["format"], "meshloom.traffic/1");
  EXPECT_EQ(traffic["steps"], nlohmann::json({0, 4}));
  EXPECT_EQ(traffic["hosts"].size(), 1U);
  ASSERT_EQ(traffic["ranks"].size(), 4U);
  for (const char* kind : {"exchange", "dispatch", "gradients"}) {
    std::int64_t sent = 0;
    std::int64_t grouped = 0;
    for (int r = 0; r < 4; ++r) {
      const auto& rank = traffic["ranks"][static_cast<std::size_t>(r)];
      if (!rank["sent"].contains(kind)) continue;
      for (const auto& [peer, bytes] : rank["sent"][kind].items()) {
        EXPECT_NE(peer, std::to_string(r));
        sent += bytes.get<std::int64_t>();
        if (std::string(kind) == "dispatch") {
          EXPECT_EQ(std::stoi(peer) / 2, r / 2) << "experts are in pairs of ranks";
        }
      }
      for (const auto& [group, of_kinds] : rank["groups"].items()) {
        grouped += of_kinds.value(kind, std::int64_t{0});
      }
    }
    EXPECT_EQ(sent, kinds[kind]) << kind;
    EXPECT_EQ(grouped, sent) << kind;
  }
  // A line a step, with every rank's times.
  std::ifstream lines(folder.file("run/ranks.jsonl"));
  int steps = 0;
  for (std::string line; std::getline(lines, line); ++steps) {
    const auto entry = nlohmann::json::parse(line);
    EXPECT_EQ(entry["step"], steps);
    for (const char* field : {"planned", "busy", "load", "exposed"}) {
      EXPECT_EQ(entry[field].size(), 4U) << field;
    }
  }
  EXPECT_EQ(steps, 4);
}

}  // namespace
}  // namespace meshloom::train::explain
