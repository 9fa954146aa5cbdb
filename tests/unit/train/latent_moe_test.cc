// A DeepSeek-V3: latent attention, shared experts and balancing by bias under any layout.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/model/safetensors.h"
#include "meshloom/train/gradients.h"
#include "meshloom/train/trainer.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::latent_moe {
namespace {

// DESIGN.md: fp64 within 1e-10 of each tensor's largest element; losses relative.
constexpr double kLayoutParity = 1e-10;
constexpr double kSpeed = 0.01;

model::ModelConfig tiny_latent() {
  return model::ModelConfig::from_json(R"({
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "first_k_dense_replace": 1,
    "initializer_range": 0.1, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6, "n_group": 3, "topk_group": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "aux_loss_alpha": 0.05})");
}

struct Meshed {
  int hdp;
  int ep;
};
const std::vector<Meshed> kMeshes{{2, 1}, {2, 2}, {3, 1}, {4, 2}, {4, 4}};

std::string text_of(const Meshed& mesh) {
  return "hdp " + std::to_string(mesh.hdp) + ", ep " + std::to_string(mesh.ep);
}

TrainConfig config_for(const std::string& run, const Meshed& mesh, std::int64_t steps) {
  TrainConfig config = tiny_config(run, steps);
  config.dtype = "float64";
  config.layout = Layout{.hdp = mesh.hdp, .ep = mesh.ep};
  config.clip_norm = 0.5;
  config.aux_loss = "sequence";
  config.bias_update_speed = kSpeed;
  return config;
}

void on_mesh(const TrainConfig& config, const std::function<void(Trainer&, int)>& body) {
  comm::run_thread_ranks(config.layout.hdp, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_latent(), tiny_loader(), world);
    body(trainer, world.rank());
  });
}

std::vector<StepMetrics> train(const TrainConfig& config, const std::string& saved) {
  std::vector<StepMetrics> result;
  on_mesh(config, [&](Trainer& trainer, int rank) {
    while (!trainer.finished()) {
      const StepMetrics metrics = trainer.step();
      if (rank == 0) result.push_back(metrics);
    }
    trainer.save_pretrained(saved);
  });
  return result;
}

std::map<std::string, at::Tensor> biases_of(const std::string& folder) {
  const model::SafetensorsFile file(folder + "/model.safetensors");
  std::map<std::string, at::Tensor> result;
  for (const auto& info : file.tensors()) {
    if (info.name.ends_with("e_score_correction_bias")) {
      result.emplace(info.name, file.tensor(info.name).to(at::kDouble));
    }
  }
  return result;
}

TEST(LatentMoe, GradientsAndCountsEqualOneProcess) {
  std::vector<data::Document> documents;
  for (const std::int64_t length : {1, 2, 3, 13, 97, 211, 40, 7, 1}) {
    data::Document document;
    for (std::int64_t t = 0; t < length; ++t) {
      document.tokens.push_back(static_cast<std::int32_t>((t * t + 3 * length) % kTinyVocabulary));
    }
    documents.push_back(std::move(document));
  }
  const TemporaryFolder folder;
  const model::ModelConfig config = tiny_latent();
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  at::Tensor values = at::empty({table.elements}, at::kDouble);
  model::initialize_(values, table, 0.2, 9);
  model::save_pretrained(folder.path(), config, table, values, {.dtype = at::kDouble});
  GradientsOptions options;
  options.model = folder.path();
  GradientsResult expected;
  comm::run_thread_ranks(
      1, [&](comm::Communicator world) { expected = gradients(options, documents, world); });
  int biases = 0;
  for (std::size_t i = 0; i < expected.names.size(); ++i) {
    if (!expected.names[i].ends_with("e_score_correction_bias")) continue;
    ++biases;
    EXPECT_EQ(expected.gradients[i].sum().item<double>(), 2.0 * 375.0) << "choices of all tokens";
  }
  EXPECT_EQ(biases, 2);
  for (const Meshed& mesh : kMeshes) {
    options.layout = Layout{.hdp = mesh.hdp, .ep = mesh.ep};
    // The longest document then fills the whole axis, shorter ones take one to three ranks.
    options.capacity_tokens = (211 + mesh.hdp - 1) / mesh.hdp;
    comm::run_thread_ranks(mesh.hdp, [&](comm::Communicator world) {
      const GradientsResult given = gradients(options, documents, world);
      if (world.rank() != mesh.hdp - 1) return;
      SCOPED_TRACE(text_of(mesh));
      EXPECT_NEAR(given.loss, expected.loss, kLayoutParity * expected.loss);
      ASSERT_EQ(given.names, expected.names);
      for (std::size_t i = 0; i < given.names.size(); ++i) {
        const double largest = expected.gradients[i].abs().max().item<double>();
        ASSERT_GT(largest, 0.0) << given.names[i];
        EXPECT_LE(given.gradients[i].sub(expected.gradients[i]).abs().max().item<double>(),
                  kLayoutParity * largest)
            << given.names[i];
      }
    });
  }
}

TEST(LatentMoe, EveryLayoutMovesTheSameBiases) {
  const TemporaryFolder folder;
  const std::int64_t steps = 4;
  const std::vector<StepMetrics> expected =
      train(config_for(folder.file("one"), {1, 1}, steps), folder.file("saved"));
  const auto biases = biases_of(folder.file("saved"));
  ASSERT_EQ(biases.size(), 2U);
  for (const auto& [name, bias] : biases) {
    // Sums of so many steps of one size, forth and back.
    const at::Tensor moves = bias.div(kSpeed);
    EXPECT_LE(moves.sub(moves.round()).abs().max().item<double>(), 1e-9) << name;
    EXPECT_LE(moves.abs().max().item<double>(), steps + 1e-9) << name;
    EXPECT_GE(moves.abs().max().item<double>(), 1.0 - 1e-9) << name;
  }
  for (const Meshed& mesh : kMeshes) {
    SCOPED_TRACE(text_of(mesh));
    const std::string run = folder.file(text_of(mesh));
    const std::vector<StepMetrics> given = train(config_for(run, mesh, steps), run + "-saved");
    ASSERT_EQ(given.size(), expected.size());
    for (std::size_t i = 0; i < given.size(); ++i) {
      EXPECT_NEAR(given[i].loss, expected[i].loss, kLayoutParity * expected[i].loss);
      EXPECT_NEAR(given[i].aux_loss, expected[i].aux_loss, kLayoutParity);
      EXPECT_GT(given[i].aux_loss, 0.0);
      EXPECT_EQ(given[i].extra.at("expert_imbalance"), expected[i].extra.at("expert_imbalance"));
    }
    for (const auto& [name, bias] : biases_of(run + "-saved")) {
      EXPECT_TRUE(bias.equal(biases.at(name))) << name;
    }
  }
}

TEST(LatentMoe, BiasesSurviveACheckpointAndAnotherLayout) {
  const TemporaryFolder folder;
  const auto straight = train(config_for(folder.file("one"), {1, 1}, 4), folder.file("straight"));
  const std::string run = folder.file("switching");
  std::vector<StepMetrics> given;
  for (const Meshed& mesh : std::vector<Meshed>{{4, 2}, {3, 1}, {2, 2}}) {
    on_mesh(config_for(run, mesh, 4), [&](Trainer& trainer, int rank) {
      const bool last = mesh.hdp == 2;
      while (!trainer.finished()) {
        const StepMetrics metrics = trainer.step();
        if (rank == 0) given.push_back(metrics);
        if (!last) break;
      }
      trainer.save_checkpoint();
      if (last) trainer.save_pretrained(folder.file("switched"));
    });
  }
  ASSERT_EQ(given.size(), straight.size());
  for (std::size_t i = 0; i < given.size(); ++i) {
    EXPECT_NEAR(given[i].loss, straight[i].loss, kLayoutParity * straight[i].loss);
  }
  const auto expected = biases_of(folder.file("straight"));
  for (const auto& [name, bias] : biases_of(folder.file("switched"))) {
    EXPECT_TRUE(bias.equal(expected.at(name))) << name;
  }
}

TEST(LatentMoe, BiasesAloneBalanceTheLoad) {
  // Mean load of the busiest expert over an equal share, less 1, of the last 30 of 60 steps.
  const auto imbalance = [](double speed) {
    const TemporaryFolder folder;
    TrainConfig config = config_for(folder.file("run"), {1, 1}, 60);
    config.optimizer.lr = 0.0;  // nothing else moves
    config.aux_loss = "none";
    config.bias_update_speed = speed;
    const auto metrics = train(config, folder.file("saved"));
    double sum = 0.0;
    for (std::size_t i = 30; i < 60; ++i) sum += metrics[i].extra.at("expert_imbalance") - 1.0;
    return sum / 30.0;
  };
  // The same documents; their tokens are too alike for perfect balance.
  EXPECT_LT(imbalance(1e-3), 0.75 * imbalance(0.0));
}

TEST(LatentMoe, SettingsThatDoNotFitAreRefused) {
  const TemporaryFolder folder;
  const auto message_of = [&](const TrainConfig& config, const model::ModelConfig& model) {
    std::string message;
    comm::run_thread_ranks(1, [&](comm::Communicator world) {
      try {
        const Trainer trainer(config, model, tiny_loader(), world);
      } catch (const Error& error) {
        message = error.what();
      }
    });
    return message;
  };
  TrainConfig config = config_for(folder.file("run"), {1, 1}, 1);
  EXPECT_NE(message_of(config, tiny_moe()).find("bias_update_speed is 0.01"), std::string::npos);
  config.z_loss_coefficient = 0.1;
  EXPECT_NE(message_of(config, tiny_latent()).find("z_loss_coefficient is 0.1"), std::string::npos);
}

}  // namespace
}  // namespace meshloom::train::latent_moe
