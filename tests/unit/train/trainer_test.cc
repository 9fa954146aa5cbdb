#include "meshloom/train/trainer.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/model/safetensors.h"
#include "meshloom/train/checkpoint.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

// fp64 training under another split of the same step: DESIGN.md's parity bound.
constexpr double kStepParity = 1e-10;

std::string slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

using Body = std::function<void(Trainer&, int rank)>;

void with_trainer(int ranks, const TrainConfig& config, const model::ModelConfig& model,
                  const Body& body,
                  const std::vector<data::Document>& documents = tiny_documents()) {
  comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
    Trainer trainer(config, model, tiny_loader(documents), world);
    body(trainer, world.rank());
  });
}

/// Metrics of every step, as rank 0 sees them.
std::vector<StepMetrics> train(int ranks, const TrainConfig& config,
                               const model::ModelConfig& model) {
  std::vector<StepMetrics> result;
  with_trainer(ranks, config, model, [&](Trainer& trainer, int rank) {
    while (!trainer.finished()) {
      const StepMetrics metrics = trainer.step();
      if (rank == 0) result.push_back(metrics);
    }
  });
  return result;
}

TEST(Trainer, LearnsAndMeasures) {
  const TemporaryFolder folder;
  const std::vector<StepMetrics> steps = train(2, tiny_config(folder.file("run"), 14), tiny_moe());
  ASSERT_EQ(steps.size(), 14U);
  EXPECT_NEAR(steps.front().loss, std::log(64.0), 0.3);
  EXPECT_LT(steps.back().loss, 0.75 * steps.front().loss);
  for (const StepMetrics& step : steps) {
    EXPECT_GT(step.tokens, 128);
    EXPECT_LE(step.tokens, 256);
    EXPECT_GT(step.tokens_per_second, 0.0);
    EXPECT_GT(step.balance_efficiency, 0.0);
    EXPECT_LE(step.balance_efficiency, 1.0 + 1e-9);
    EXPECT_GT(step.measured_efficiency, 0.0);
    EXPECT_LE(step.measured_efficiency, 1.0);
    EXPECT_GT(step.gradient_norm, 0.0);
    EXPECT_FALSE(step.skipped);
  }
  EXPECT_GT(steps.back().aux_loss, 0.0);
  EXPECT_DOUBLE_EQ(steps[0].lr, 1e-2 / 3);
}

TEST(Trainer, EveryRankCountAndStrategyTrainsAlike) {
  const TemporaryFolder folder;
  for (const char* form : {"none", "sequence", "global", "global_lagged"}) {
    TrainConfig config = tiny_config(folder.file("run"), 3);
    config.dtype = "float64";
    config.aux_loss = form;
    config.z_loss_coefficient = 1e-3;
    const std::vector<StepMetrics> expected = train(1, config, tiny_moe());
    for (const auto& [ranks, strategy] : std::vector<std::pair<int, const char*>>{
             {2, "balanced"}, {3, "static"}, {4, "naive_hdp"}}) {
      config.strategy = strategy;
      const std::vector<StepMetrics> steps = train(ranks, config, tiny_moe());
      for (std::size_t i = 0; i < steps.size(); ++i) {
        const auto close = [&](double a, double b, const char* what) {
          EXPECT_NEAR(a, b, kStepParity * std::max(1.0, std::abs(b)))
              << what << ' ' << form << ' ' << ranks << ' ' << strategy << " step " << i;
        };
        close(steps[i].loss, expected[i].loss, "loss");
        close(steps[i].aux_loss, expected[i].aux_loss, "aux_loss");
        close(steps[i].z_loss, expected[i].z_loss, "z_loss");
        close(steps[i].gradient_norm, expected[i].gradient_norm, "gradient_norm");
      }
    }
  }
}

/// Exchanges of the units of two or more ranks in the first step's plan, and the first notice.
std::pair<std::vector<plan::Exchange>, std::string> exchanges_of(const TrainConfig& config) {
  std::pair<std::vector<plan::Exchange>, std::string> result;
  with_trainer(4, config, tiny_dense(), [&](Trainer& trainer, int rank) {
    static_cast<void>(trainer.step());
    if (rank != 0) return;
    for (const plan::Slot& slot : trainer.last_plan().slots) {
      for (const plan::Unit& unit : slot.units) {
        if (unit.ranks.size() > 1) result.first.push_back(unit.exchange);
      }
    }
    if (!trainer.notices().empty()) result.second = trainer.notices().front();
  });
  return result;
}

TEST(Trainer, UnitsUseTheExchangeThatRulesOrFiguresName) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 2);
  config.strategy = "static";  // every document on every rank that the longest needs
  config.deterministic = false;
  config.exchange = "all_gather:-3,ulysses";
  const auto [named, by_rule] = exchanges_of(config);
  ASSERT_FALSE(named.empty());
  for (const plan::Exchange exchange : named) {
    EXPECT_TRUE(exchange == plan::Exchange::kAllGather || exchange == plan::Exchange::kUlysses);
  }
  EXPECT_NE(by_rule.find("by rule"), std::string::npos) << by_rule;

  config.exchange = "auto";
  config.exchange_dtype = "bfloat16";
  const auto [measured, table] = exchanges_of(config);
  EXPECT_EQ(measured.size(), named.size());
  for (const char* word : {"ring ", "all_gather ", "ulysses ", "exposed"}) {
    EXPECT_NE(table.find(word), std::string::npos) << table;
  }

  config.deterministic = true;
  for (const plan::Exchange exchange : exchanges_of(config).first) {
    EXPECT_EQ(exchange, plan::Exchange::kRing);
  }
}

TEST(Trainer, ResumesBitForBit) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const TemporaryFolder folder;
    TrainConfig straight = tiny_config(folder.file("straight"));
    straight.dtype = dtype;
    TrainConfig broken = straight;
    broken.run = folder.file("broken");
    std::vector<double> losses;
    with_trainer(3, straight, tiny_moe(), [&](Trainer& trainer, int rank) {
      while (!trainer.finished()) {
        const double loss = trainer.step().loss;
        if (rank == 0) losses.push_back(loss);
      }
      trainer.save_pretrained(folder.file("a"));
    });
    with_trainer(3, broken, tiny_moe(), [&](Trainer& trainer, int /*rank*/) {
      for (int i = 0; i < 3; ++i) static_cast<void>(trainer.step());
      trainer.save_checkpoint();
    });
    with_trainer(3, broken, tiny_moe(), [&](Trainer& trainer, int rank) {
      EXPECT_EQ(trainer.next_step(), 3);
      EXPECT_FALSE(trainer.resumed_from().empty());
      while (!trainer.finished()) {
        const StepMetrics metrics = trainer.step();
        if (rank == 0) {
          EXPECT_EQ(metrics.loss, losses.at(static_cast<std::size_t>(metrics.step))) << dtype;
        }
      }
      trainer.save_pretrained(folder.file("b"));
    });
    EXPECT_EQ(slurp(folder.file("a") + "/model.safetensors"),
              slurp(folder.file("b") + "/model.safetensors"))
        << dtype;
  }
}

TEST(Trainer, RestartsOnAnotherNumberOfRanks) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"));
  config.dtype = "float64";
  const std::vector<StepMetrics> expected = train(2, config, tiny_dense());
  with_trainer(2, config, tiny_dense(), [&](Trainer& trainer, int /*rank*/) {
    for (int i = 0; i < 3; ++i) static_cast<void>(trainer.step());
    trainer.save_checkpoint();
  });
  const std::vector<StepMetrics> rest = train(5, config, tiny_dense());
  ASSERT_EQ(rest.size(), 3U);
  for (std::size_t i = 0; i < rest.size(); ++i) {
    EXPECT_NEAR(rest[i].loss, expected[i + 3].loss, kStepParity);
    EXPECT_NEAR(rest[i].gradient_norm, expected[i + 3].gradient_norm,
                kStepParity * expected[i + 3].gradient_norm);
  }
}

TEST(Trainer, RunLeavesItsFolder) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 4);
  config.checkpoint.every_steps = 2;
  config.evaluate_every = 2;
  config.data.held_out_fraction = 0.2;
  int calls = 0;
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_moe(), tiny_loader(tiny_documents(), 0.2), world);
    trainer.run([&](const StepMetrics&) { calls += world.rank() == 0 ? 1 : 0; });
  });
  EXPECT_EQ(calls, 4);
  std::ifstream metrics(folder.file("run/metrics.jsonl"));
  int steps = 0;
  int evaluations = 0;
  for (std::string line; std::getline(metrics, line);) {
    const auto entry = nlohmann::json::parse(line);
    evaluations += entry.contains("evaluation_loss") ? 1 : 0;
    if (!entry.contains("loss")) continue;
    EXPECT_EQ(entry["step"], steps);
    EXPECT_TRUE(entry["tokens_per_second"].is_number());
    EXPECT_TRUE(entry["exchange_bytes"].is_number());
    ++steps;
  }
  EXPECT_EQ(steps, 4);
  EXPECT_EQ(evaluations, 2);
  EXPECT_EQ(TrainConfig::load(folder.file("run/config.yaml")).layout.hdp, 2);
  for (int i = 0; i < 4; ++i) {
    const auto plan =
        plan::StepPlan::load(folder.file("run/plans/step-0000000" + std::to_string(i) + ".json"));
    EXPECT_EQ(plan.step, i);
  }
  const auto timeline = nlohmann::json::parse(slurp(folder.file("run/timeline.json")));
  std::vector<std::string> kinds;
  for (const auto& event : timeline) kinds.push_back(event["name"]);
  for (const char* kind : {"process_name", "forward", "backward", "reduce", "step"}) {
    EXPECT_NE(std::find(kinds.begin(), kinds.end(), kind), kinds.end()) << kind;
  }
  EXPECT_EQ(list_checkpoints(folder.file("run/checkpoints")).size(), 2U);
  EXPECT_EQ(model::ModelConfig::load(folder.file("run/checkpoint/config.json")).layers, 2);
  EXPECT_TRUE(std::filesystem::exists(folder.file("run/checkpoint/model.safetensors")));

  // A finished run has nothing left to do; starting over keeps the old records.
  config.checkpoint.resume = "no";
  comm::run_thread_ranks(1, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_moe(), tiny_loader(), world);
    config.evaluate_every = 0;
    EXPECT_EQ(trainer.next_step(), 0);
    static_cast<void>(trainer.step());
    trainer.save_checkpoint();
    ASSERT_EQ(trainer.notices().size(), 1U);
    EXPECT_NE(trainer.notices()[0].find("previous-1"), std::string::npos);
  });
  EXPECT_TRUE(std::filesystem::exists(folder.file("run/previous-1/metrics.jsonl")));
}

TEST(Trainer, MinutesBetweenCheckpointsAreTheFirstRanksClock) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 3);
  config.checkpoint.keep = 0;
  config.checkpoint.every_minutes = 1e-9;  // over after every step
  with_trainer(2, config, tiny_dense(), [](Trainer& trainer, int /*rank*/) { trainer.run(); });
  EXPECT_EQ(list_checkpoints(folder.file("run/checkpoints")).size(), 3U);
  config.run = folder.file("other");
  config.checkpoint.every_minutes = 1e9;
  with_trainer(2, config, tiny_dense(), [](Trainer& trainer, int /*rank*/) { trainer.run(); });
  EXPECT_EQ(list_checkpoints(folder.file("other/checkpoints")).size(), 1U);  // at the end
}

TEST(Trainer, SecondRunInAFolderIsRefusedWhileTheFirstGoesOn) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"), 2);
  TrainConfig anew = config;
  anew.checkpoint.resume = "no";
  comm::run_thread_ranks(1, [&](comm::Communicator world) {
    const auto make = [&](const TrainConfig& chosen) {
      return std::make_unique<Trainer>(chosen, tiny_dense(), tiny_loader(), world);
    };
    const auto refusal = [](const auto& call) { return message_of<InvalidArgument>(call); };
    auto first = make(config);
    static_cast<void>(first->step());
    first->save_checkpoint();
    // Whoever would continue meets the lock at once, whoever starts over when it writes.
    const std::string text = refusal([&] { static_cast<void>(make(config)); });
    EXPECT_NE(text.find(folder.file("run") + " is in use by"), std::string::npos) << text;
    EXPECT_NE(text.find("--run"), std::string::npos);
    auto second = make(anew);
    static_cast<void>(second->step());
    EXPECT_NE(refusal([&] { second->save_checkpoint(); }).find("is in use by"), std::string::npos);
    EXPECT_EQ(list_checkpoints(folder.file("run/checkpoints")).size(), 1U);
    // A run that has ended lets go.
    first->run();
    EXPECT_EQ(make(config)->next_step(), 2);
    first.reset();
    second->save_checkpoint();
    EXPECT_EQ(list_checkpoints(folder.file("run/checkpoints")).size(), 1U);
  });
}

TEST(Trainer, StopRequestSavesAndResumedRecordsFit) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 6);
  with_trainer(2, config, tiny_dense(), [&](Trainer& trainer, int rank) {
    trainer.run([&](const StepMetrics& metrics) {
      if (rank == 1 && metrics.step == 1) Trainer::request_stop();
    });
    EXPECT_LT(trainer.next_step(), 6);
    EXPECT_GE(trainer.next_step(), 2);
  });
  ASSERT_EQ(list_checkpoints(folder.file("run/checkpoints")).size(), 1U);
  with_trainer(2, config, tiny_dense(), [&](Trainer& trainer, int /*rank*/) { trainer.run(); });
  std::ifstream metrics(folder.file("run/metrics.jsonl"));
  int steps = 0;
  for (std::string line; std::getline(metrics, line); ++steps) {
    EXPECT_EQ(nlohmann::json::parse(line)["step"], steps);
  }
  EXPECT_EQ(steps, 6);
}

TEST(Trainer, DamagedCheckpointIsReportedAndTheOneBeforeUsed) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"));
  with_trainer(2, config, tiny_dense(), [&](Trainer& trainer, int /*rank*/) {
    static_cast<void>(trainer.step());
    trainer.save_checkpoint();
    static_cast<void>(trainer.step());
    trainer.save_checkpoint();
  });
  const std::string newest = list_checkpoints(folder.file("run/checkpoints")).at(0);
  const std::string file = newest + "/rank-00001.safetensors";
  {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(-2, std::ios::end);
    stream.put('\x55');
  }
  with_trainer(3, config, tiny_dense(), [&](Trainer& trainer, int /*rank*/) {
    EXPECT_EQ(trainer.next_step(), 1);
    ASSERT_EQ(trainer.notices().size(), 1U);
    EXPECT_NE(trainer.notices()[0].find("rank-00001.safetensors is damaged"), std::string::npos);
    static_cast<void>(trainer.step());
  });
  config.checkpoint.resume = "strict";
  const std::string refused =
      message_of<DataError>([&] { with_trainer(2, config, tiny_dense(), [](Trainer&, int) {}); });
  EXPECT_NE(refused.find(file), std::string::npos) << refused;
  std::filesystem::remove(folder.file("run/checkpoints/step-00000001/manifest.json"));
  config.checkpoint.resume = "auto";
  EXPECT_NE(message_of<IoError>([&] {
              with_trainer(2, config, tiny_dense(), [](Trainer&, int) {});
            }).find("no checkpoint in"),
            std::string::npos);
}

/// A model folder whose embedding of token 63 is not a number.
std::string poisoned_model(const std::string& folder) {
  const model::ModelConfig config = tiny_dense();
  const model::ParameterTable table = model::parameter_table(config, {0, 2}, true, true);
  at::Tensor values = at::zeros({table.elements}, at::kFloat);
  model::initialize_(values, table, 0.05, 1);
  values.narrow(0, table.find("model.embed_tokens.weight").offset + 63 * 32, 32)
      .fill_(std::numeric_limits<float>::quiet_NaN());
  model::save_pretrained(folder, config, table, values);
  return folder;
}

std::vector<data::Document> documents_with_one_bad() {
  std::vector<data::Document> documents;
  for (int i = 0; i < 24; ++i) {
    documents.push_back({.tokens = std::vector<std::int32_t>(static_cast<std::size_t>(20 + i), i),
                         .loss_mask = {}});
  }
  documents[7].tokens[3] = 63;
  return documents;
}

TEST(Trainer, NanStopsAndNamesRankUnitAndSample) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 8);
  config.model.path = poisoned_model(folder.file("model"));
  std::mutex mutex;
  std::vector<std::string> messages;
  comm::run_thread_ranks(3, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_dense(), tiny_loader(documents_with_one_bad()), world);
    const std::string message = message_of<DataError>([&] {
      while (!trainer.finished()) static_cast<void>(trainer.step());
    });
    const std::lock_guard lock(mutex);
    messages.push_back(message);
  });
  ASSERT_EQ(messages.size(), 3U);
  EXPECT_NE(messages[0].find("NaN or Inf in the loss on rank"), std::string::npos) << messages[0];
  EXPECT_NE(messages[0].find("tiny[7]"), std::string::npos) << messages[0];
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_EQ(messages[0], messages[2]);
}

TEST(Trainer, NanSkipsWhereAskedAndTrainsOn) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 4);
  config.model.path = poisoned_model(folder.file("model"));
  config.nan_policy = "skip";
  with_trainer(
      2, config, tiny_dense(),
      [&](Trainer& trainer, int /*rank*/) {
        int skipped = 0;
        while (!trainer.finished()) skipped += trainer.step().skipped ? 1 : 0;
        EXPECT_GE(skipped, 1);
        EXPECT_LT(skipped, 4);
        EXPECT_EQ(trainer.notices().size(), static_cast<std::size_t>(skipped));
      },
      documents_with_one_bad());
}

TEST(Trainer, StepWithoutLossTokensIsSkipped) {
  const TemporaryFolder folder;
  const std::vector<data::Document> documents(40, {.tokens = {5}, .loss_mask = {}});
  with_trainer(
      2, tiny_config(folder.file("run"), 2), tiny_dense(),
      [&](Trainer& trainer, int /*rank*/) {
        const StepMetrics metrics = trainer.step();
        EXPECT_TRUE(metrics.skipped);
        EXPECT_EQ(metrics.loss_tokens, 0);
        EXPECT_EQ(trainer.step().extra.at("skipped_steps"), 2.0);
      },
      documents);
}

TEST(Trainer, HeldOutLossIsTheSameOnAnyNumberOfRanks) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"));
  config.dtype = "float64";
  std::vector<double> losses;
  for (const int ranks : {1, 3}) {
    comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
      Trainer trainer(config, tiny_moe(), tiny_loader(tiny_documents(), 0.2), world);
      const double loss = trainer.evaluate();
      if (world.rank() == 0) losses.push_back(loss);
    });
  }
  EXPECT_NEAR(losses.at(0), losses.at(1), kStepParity);
  EXPECT_NE(message_of<DataError>([&] {
              with_trainer(2, config, tiny_dense(),
                           [](Trainer& trainer, int) { static_cast<void>(trainer.evaluate()); });
            }).find("held_out_fraction"),
            std::string::npos);
}

}  // namespace
}  // namespace meshloom::train
