// Training under five-dimensional layouts: losses, saved models and checkpoints as on one rank.

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/trainer.h"
#include "model_difference.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::layouts_training {
namespace {

// DESIGN.md: losses of any two layouts, relative.
constexpr double kDoubleParity = 1e-10;
constexpr double kSingleParity = 1e-4;

/// Four layers, dense ones between mixtures, one K/V head, tied or not.
model::ModelConfig deep_model(bool tied) {
  return model::ModelConfig::from_json(std::string(R"({
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu",
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
    "initializer_range": 0.1, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "attention_bias": true, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": true, "decoder_sparse_step": 1,
    "mlp_only_layers": [0, 2], "router_aux_loss_coef": 0.02, "tie_word_embeddings": )") +
                                       (tied ? "true}" : "false}"));
}

struct Spread {
  Layout layout;
  ParallelSection parallel{};
};

std::string text_of(const Spread& run) {
  return run.layout.to_string() + ", zero " + std::to_string(run.parallel.zero) + ", " +
         run.parallel.pipeline + ", recompute " + run.parallel.recompute;
}

/// Eight ranks each.
std::vector<Spread> eight_ranks() {
  return {
      {{.hdp = 8}, {.zero = 2}},
      {{.hdp = 8, .ep = 2}, {.zero = 2, .ranks_per_node = 4}},
      {{.hdp = 8, .ep = 4}, {.zero = 3}},
      {{.tp = 4, .hdp = 2}, {.zero = 3, .recompute = "full"}},
      {{.tp = 2, .hdp = 2, .pp = 2, .ep = 2}, {.pipeline = "zb_h1", .recompute = "selective"}},
      {{.hdp = 2, .pp = 4}, {.pipeline = "1f1b"}},
      {{.tp = 2, .hdp = 2, .pp = 2, .chunks = 2}, {.zero = 2, .pipeline = "zb_v"}},
      {{.tp = 2, .pp = 4}, {.pipeline = "zb_h1", .split = {1, 2, 1, 0}}},
  };
}

TrainConfig config_of(const std::string& folder, const Spread& run, std::int64_t steps,
                      const std::string& dtype) {
  TrainConfig config = tiny_config(folder, steps);
  config.dtype = dtype;
  config.layout = run.layout;
  config.parallel = run.parallel;
  config.z_loss_coefficient = 1e-3;
  config.clip_norm = 0.5;
  return config;
}

/// Loss and gradient norm of every step; the model is saved in the run folder.
std::vector<double> train(const TrainConfig& config, const model::ModelConfig& model,
                          const std::shared_ptr<plan::BalanceStrategy>& strategy = nullptr) {
  std::vector<double> result;
  comm::run_thread_ranks(config.layout.world_size(), [&](comm::Communicator world) {
    Trainer trainer(config, model, tiny_loader(), world, strategy);
    trainer.run([&](const StepMetrics& metrics) {
      if (world.rank() != 0) return;
      result.push_back(metrics.loss);
      result.push_back(metrics.aux_loss);
      result.push_back(metrics.gradient_norm);
    });
  });
  return result;
}

void expect_alike(const std::vector<double>& given, const std::vector<double>& expected,
                  double parity) {
  ASSERT_EQ(given.size(), expected.size());
  for (std::size_t i = 0; i < given.size(); ++i) {
    EXPECT_NEAR(given[i], expected[i], parity * std::max(1.0, std::abs(expected[i]))) << i;
  }
}

TEST(LayoutsTraining, AnyTwoLayoutsGiveTheSameLossesAndWeights) {
  for (const bool tied : {true, false}) {
    const TemporaryFolder alone;
    const auto expected = train(config_of(alone.path(), {}, 3, "float64"), deep_model(tied));
    for (const Spread& run : eight_ranks()) {
      SCOPED_TRACE(text_of(run));
      const TemporaryFolder folder;
      expect_alike(train(config_of(folder.path(), run, 3, "float64"), deep_model(tied)), expected,
                   kDoubleParity);
      EXPECT_LT(largest_difference(folder.file("checkpoint"), alone.file("checkpoint")),
                kDoubleParity);
    }
  }
}

TEST(LayoutsTraining, SinglePrecisionDiffersByRoundingAlone) {
  const TemporaryFolder alone;
  const auto expected = train(config_of(alone.path(), {}, 3, "float32"), deep_model(false));
  for (const Spread& run : eight_ranks()) {
    SCOPED_TRACE(text_of(run));
    const TemporaryFolder folder;
    expect_alike(train(config_of(folder.path(), run, 3, "float32"), deep_model(false)), expected,
                 kSingleParity);
  }
}

/// A run goes on under another layout, optimizer state included, as if nothing had happened.
TEST(LayoutsTraining, CheckpointsOfAnyLayoutContinueUnderAnyOther) {
  const TemporaryFolder alone;
  const auto expected = train(config_of(alone.path(), {}, 6, "float64"), deep_model(true));
  const TemporaryFolder folder;
  std::vector<double> given;
  std::vector<Spread> runs = eight_ranks();
  runs.resize(5);
  runs.push_back({});
  std::int64_t steps = 0;
  for (const Spread& run : runs) {
    TrainConfig config = config_of(folder.path(), run, ++steps, "float64");
    config.schedule.steps = 6;
    const auto part = train(config, deep_model(true));
    given.insert(given.end(), part.begin(), part.end());
  }
  expect_alike(given, expected, kDoubleParity);
  EXPECT_LT(largest_difference(folder.file("checkpoint"), alone.file("checkpoint")), kDoubleParity);
}

/// DESIGN.md, deterministic mode: tp = hdp = 1, same slots, same threads, no clipping.
TEST(LayoutsTraining, PipelinesAreTheSequentialStepBitForBit) {
  // The same slots whatever the pipeline: two documents each.
  const auto strategy = plan::make_strategy([](const plan::PlanProblem& problem) {
    std::vector<plan::Slot> slots;
    for (const auto& sample : problem.samples) {
      if (slots.empty() || slots.back().units.front().samples.size() == 2) {
        slots.push_back({{{.ranks = {0}, .samples = {}}}});
      }
      slots.back().units.front().samples.push_back(sample.id);
    }
    return slots;
  });
  const TemporaryFolder alone;
  const auto plain = [](const std::string& folder, const Spread& run) {
    TrainConfig config = config_of(folder, run, 3, "float32");
    config.capacity_tokens = 256;
    config.clip_norm = 0.0;
    return config;
  };
  const auto expected = train(plain(alone.path(), {}), deep_model(false), strategy);
  for (const Spread& run : std::vector<Spread>{
           {{.pp = 2}, {.pipeline = "1f1b"}},
           {{.pp = 4}, {.pipeline = "zb_h1"}},
           {{.pp = 2, .chunks = 2}, {.pipeline = "interleaved_1f1b", .recompute = "full"}},
           {{.pp = 2, .chunks = 2}, {.pipeline = "zb_v"}},
           {{.pp = 3}, {.pipeline = "1f1b", .split = {1, 1, 2}, .recompute = "selective"}}}) {
    SCOPED_TRACE(text_of(run));
    const TemporaryFolder folder;
    const auto given = train(plain(folder.path(), run), deep_model(false), strategy);
    ASSERT_EQ(given.size(), expected.size());
    for (std::size_t i = 0; i < given.size(); i += 3) EXPECT_EQ(given[i], expected[i]) << i;
    EXPECT_EQ(largest_difference(folder.file("checkpoint"), alone.file("checkpoint")), 0.0);
  }
}

TEST(LayoutsTraining, LayoutsThatDoNotFitSayWhatWould) {
  const auto message = [&](const Spread& run) -> std::string {
    const TemporaryFolder folder;
    std::string text;
    comm::run_thread_ranks(run.layout.world_size(), [&](comm::Communicator world) {
      try {
        Trainer trainer(config_of(folder.path(), run, 1, "float32"), deep_model(false),
                        tiny_loader(), world);
      } catch (const InvalidArgument& error) {
        if (world.rank() == 0) text = error.what();
      }
    });
    return text;
  };
  EXPECT_NE(message({{.tp = 3}}).find("4 query heads and 1 key/value heads; these do: 1, 2, 4"),
            std::string::npos);
  EXPECT_NE(message({{.pp = 5}}).find("4 layers"), std::string::npos);
  EXPECT_NE(message({{.pp = 2}, {.split = {1, 2}}}).find("add up to 4 layers"), std::string::npos);
  EXPECT_NE(message({{.pp = 2}, {.pipeline = "zb_v"}}).find("takes 2 model chunks"),
            std::string::npos);
}

TEST(LayoutsTraining, TheModelAFinishedRunLeavesIsWhatItHolds) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const TemporaryFolder folder;
    TrainConfig config =
        config_of(folder.path(), {{.tp = 2, .hdp = 2}, {.zero = 3}}, /*steps=*/2, dtype);
    comm::run_thread_ranks(4, [&](comm::Communicator world) {
      Trainer trainer(config, deep_model(true), tiny_loader(), world);
      trainer.run();
      trainer.save_pretrained(folder.file("held"));
    });
    EXPECT_EQ(largest_difference(folder.file("checkpoint"), folder.file("held")), 0.0) << dtype;
  }
}

}  // namespace
}  // namespace meshloom::train::layouts_training
