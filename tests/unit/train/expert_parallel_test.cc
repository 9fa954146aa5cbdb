// Expert parallelism end to end: gradients, training, checkpoints and saved models as on one rank.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/train/gradients.h"
#include "meshloom/train/trainer.h"
#include "model_difference.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

// DESIGN.md: fp64 within 1e-10 of each tensor's largest element; losses and norms relative.
constexpr double kLayoutParity = 1e-10;

/// A dense layer between two mixtures of six experts, which four ranks share unevenly.
model::ModelConfig layered_moe() {
  return model::ModelConfig::from_json(R"({
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu",
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "initializer_range": 0.1, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "tie_word_embeddings": false, "attention_bias": false, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": true,
    "decoder_sparse_step": 1, "mlp_only_layers": [1], "router_aux_loss_coef": 0.02})");
}

struct Meshed {
  int hdp;
  int ep;
};
std::string text_of(const Meshed& mesh) {
  return "hdp " + std::to_string(mesh.hdp) + ", ep " + std::to_string(mesh.ep);
}

TrainConfig fp64_config(const std::string& run, const Meshed& mesh, std::int64_t steps) {
  TrainConfig config = tiny_config(run, steps);
  config.dtype = "float64";
  config.layout = Layout{.hdp = mesh.hdp, .ep = mesh.ep};
  config.z_loss_coefficient = 1e-3;
  config.clip_norm = 0.5;
  return config;
}

using TrainerBody = std::function<void(Trainer&, int rank)>;

void on_mesh(const TrainConfig& config, const TrainerBody& body,
             const std::vector<data::Document>& documents = tiny_documents()) {
  comm::run_thread_ranks(config.layout.hdp, [&](comm::Communicator world) {
    Trainer trainer(config, layered_moe(), tiny_loader(documents), world);
    body(trainer, world.rank());
  });
}

std::vector<StepMetrics> metrics_of(const TrainConfig& config) {
  std::vector<StepMetrics> result;
  on_mesh(config, [&](Trainer& trainer, int rank) {
    while (!trainer.finished()) {
      const StepMetrics metrics = trainer.step();
      if (rank == 0) result.push_back(metrics);
    }
  });
  return result;
}

void expect_alike(const std::vector<StepMetrics>& given, const std::vector<StepMetrics>& expected,
                  const std::string& what) {
  ASSERT_EQ(given.size(), expected.size()) << what;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const auto close = [&](double a, double b, const char* name) {
      EXPECT_NEAR(a, b, kLayoutParity * std::max(1.0, std::abs(b)))
          << name << ", " << what << ", step " << given[i].step;
    };
    close(given[i].loss, expected[i].loss, "loss");
    close(given[i].aux_loss, expected[i].aux_loss, "aux_loss");
    close(given[i].z_loss, expected[i].z_loss, "z_loss");
    close(given[i].gradient_norm, expected[i].gradient_norm, "gradient_norm");
    EXPECT_GE(given[i].extra.at("expert_imbalance"), 1.0) << what;
    EXPECT_GE(given[i].extra.at("expert_imbalance_worst"), given[i].extra.at("expert_imbalance"));
    EXPECT_EQ(given[i].extra.at("expert_imbalance"), expected[i].extra.at("expert_imbalance"))
        << what << ": counts are whole numbers";
  }
}

TEST(ExpertParallelGradients, EqualOneProcess) {
  std::vector<data::Document> documents;
  for (const std::int64_t length : {1, 2, 3, 13, 97, 211, 40, 7, 1}) {
    data::Document document;
    for (std::int64_t t = 0; t < length; ++t) {
      document.tokens.push_back(static_cast<std::int32_t>((t * t + 3 * length) % kTinyVocabulary));
    }
    documents.push_back(std::move(document));
  }
  const TemporaryFolder folder;
  const model::ModelConfig config = layered_moe();
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  at::Tensor values = at::empty({table.elements}, at::kDouble);
  model::initialize_(values, table, 0.2, 9);
  model::save_pretrained(folder.path(), config, table, values, {.dtype = at::kDouble});
  GradientsOptions options;
  options.model = folder.path();
  options.aux_loss = true;
  GradientsResult expected;
  comm::run_thread_ranks(
      1, [&](comm::Communicator world) { expected = gradients(options, documents, world); });
  for (const Meshed& mesh : std::vector<Meshed>{{2, 2}, {4, 2}, {4, 4}, {8, 2}, {8, 4}}) {
    options.layout = Layout{.hdp = mesh.hdp, .ep = mesh.ep};
    // The longest document then fills the whole axis, shorter ones take one to three ranks.
    options.capacity_tokens = (211 + mesh.hdp - 1) / mesh.hdp;
    comm::run_thread_ranks(mesh.hdp, [&](comm::Communicator world) {
      const GradientsResult given = gradients(options, documents, world);
      if (world.rank() != mesh.hdp - 1) return;
      SCOPED_TRACE(text_of(mesh));
      EXPECT_EQ(given.plan.lockstep, plan::Lockstep::kEp);
      EXPECT_NEAR(given.loss, expected.loss, kLayoutParity * expected.loss);
      EXPECT_NEAR(given.aux_loss, expected.aux_loss, kLayoutParity * expected.aux_loss);
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

TEST(ExpertParallelTrainer, EveryLayoutAndBalanceLossTrainsAsOneProcess) {
  const TemporaryFolder folder;
  for (const char* form : {"none", "sequence", "global", "global_lagged"}) {
    TrainConfig config = fp64_config(folder.file("run"), {1, 1}, 3);
    config.aux_loss = form;
    const std::vector<StepMetrics> expected = metrics_of(config);
    for (const Meshed& mesh : std::vector<Meshed>{{2, 2}, {4, 2}, {8, 4}}) {
      config.layout = Layout{.hdp = mesh.hdp, .ep = mesh.ep};
      expect_alike(metrics_of(config), expected, std::string(form) + ", " + text_of(mesh));
    }
  }
}

TEST(ExpertParallelTrainer, CheckpointsLoadUnderAnyLayout) {
  const TemporaryFolder folder;
  const std::vector<StepMetrics> expected = metrics_of(fp64_config(folder.file("one"), {1, 1}, 6));
  on_mesh(fp64_config(folder.file("one"), {1, 1}, 6), [&](Trainer& trainer, int) {
    while (!trainer.finished()) static_cast<void>(trainer.step());
    trainer.save_pretrained(folder.file("whole"));
  });
  // Each pair hands its state on: experts over two ranks, over four unevenly, nowhere, over two.
  const std::vector<Meshed> meshes{{4, 2}, {4, 4}, {3, 1}, {2, 2}};
  const std::string run = folder.file("switching");
  std::vector<StepMetrics> given;
  for (std::size_t i = 0; i < meshes.size(); ++i) {
    on_mesh(fp64_config(run, meshes[i], 6), [&](Trainer& trainer, int rank) {
      EXPECT_EQ(trainer.resumed_from().empty(), i == 0);
      const bool last = i + 1 == meshes.size();
      while (!trainer.finished()) {
        const StepMetrics metrics = trainer.step();
        if (rank == 0) given.push_back(metrics);
        if (!last) break;
      }
      trainer.save_checkpoint();
      if (last) trainer.save_pretrained(folder.file("switched"));
    });
  }
  expect_alike(given, expected, "switching layouts");
  // Adam divides by the root of tiny moments: a few roundings are amplified.
  constexpr double kWeightParity = 1e-9;
  EXPECT_LE(largest_difference(folder.file("switched"), folder.file("whole")), kWeightParity);
}

TEST(ExpertParallelTrainer, ResumesBitForBitInDeterministicMode) {
  const TemporaryFolder folder;
  TrainConfig straight = fp64_config(folder.file("straight"), {4, 2}, 4);
  straight.dtype = "bfloat16";
  TrainConfig broken = straight;
  broken.run = folder.file("broken");
  const std::vector<StepMetrics> expected = metrics_of(straight);
  on_mesh(broken, [&](Trainer& trainer, int) {
    for (int i = 0; i < 2; ++i) static_cast<void>(trainer.step());
    trainer.save_checkpoint();
  });
  const std::vector<StepMetrics> rest = metrics_of(broken);
  ASSERT_EQ(rest.size(), 2U);
  for (std::size_t i = 0; i < rest.size(); ++i) EXPECT_EQ(rest[i].loss, expected[i + 2].loss);
}

TEST(ExpertParallelTrainer, PretrainedModelStartsTheSameAnywhere) {
  const TemporaryFolder folder;
  on_mesh(fp64_config(folder.file("made"), {1, 1}, 1),
          [&](Trainer& trainer, int) { trainer.save_pretrained(folder.file("model")); });
  TrainConfig config = fp64_config(folder.file("run"), {4, 4}, 1);
  on_mesh(config, [&](Trainer& trainer, int) { trainer.save_pretrained(folder.file("by_seed")); });
  EXPECT_EQ(largest_difference(folder.file("by_seed"), folder.file("model")), 0.0);
  config.seed = 1234;
  config.model.path = folder.file("model");
  on_mesh(config, [&](Trainer& trainer, int) { trainer.save_pretrained(folder.file("loaded")); });
  EXPECT_EQ(largest_difference(folder.file("loaded"), folder.file("model")), 0.0);
}

TEST(ExpertParallelTrainer, HeldOutLossIsTheSame) {
  const TemporaryFolder folder;
  std::vector<double> losses;
  for (const Meshed& mesh : std::vector<Meshed>{{1, 1}, {4, 2}}) {
    comm::run_thread_ranks(mesh.hdp, [&](comm::Communicator world) {
      Trainer trainer(fp64_config(folder.file("run"), mesh, 1), layered_moe(),
                      tiny_loader(tiny_documents(), 0.2), world);
      const double loss = trainer.evaluate();
      if (world.rank() == 0) losses.push_back(loss);
    });
  }
  EXPECT_NEAR(losses.at(0), losses.at(1), kLayoutParity);
}

TEST(ExpertParallelTrainer, RulesReachReplicatedParametersAndExperts) {
  const TemporaryFolder folder;
  TrainConfig config = fp64_config(folder.file("run"), {1, 1}, 2);
  config.rules = {{.pattern = "embed_tokens", .frozen = true},
                  {.pattern = R"(experts\.[03]\.)", .lr_factor = 0.5}};
  on_mesh(config, [&](Trainer& trainer, int) {
    while (!trainer.finished()) static_cast<void>(trainer.step());
    trainer.save_pretrained(folder.file("one"));
  });
  config.layout = Layout{.hdp = 4, .ep = 4};
  on_mesh(config, [&](Trainer& trainer, int) {
    while (!trainer.finished()) static_cast<void>(trainer.step());
    trainer.save_pretrained(folder.file("four"));
  });
  EXPECT_LE(largest_difference(folder.file("four"), folder.file("one")), kLayoutParity);
  config.rules = {{.pattern = "no such parameter"}};
  EXPECT_NE(message_of<InvalidArgument>([&] {
              on_mesh(config, [](Trainer&, int) {});
            }).find("no such parameter"),
            std::string::npos);
}

TEST(ExpertParallelTrainer, NanNamesTheUnitWhoseTokensItWas) {
  const TemporaryFolder folder;
  const model::ModelConfig model = layered_moe();
  const auto table = model::parameter_table(model, {0, model.layers}, true, true);
  at::Tensor values = at::empty({table.elements}, at::kFloat);
  model::initialize_(values, table, model.initializer_range, 3);
  // Only document 7 has token 63.
  values.narrow(0, table.find("model.embed_tokens.weight").offset + 63 * model.hidden_size, 1)
      .fill_(std::numeric_limits<float>::quiet_NaN());
  model::save_pretrained(folder.file("model"), model, table, values);
  std::vector<data::Document> documents;
  for (int i = 0; i < 24; ++i) {
    documents.push_back({.tokens = std::vector<std::int32_t>(static_cast<std::size_t>(20 + i), i),
                         .loss_mask = {}});
  }
  documents[7].tokens[3] = 63;
  TrainConfig config = tiny_config(folder.file("run"), 8);
  config.model.path = folder.file("model");
  config.layout = Layout{.hdp = 4, .ep = 2};
  std::mutex mutex;
  std::vector<std::string> messages;
  on_mesh(
      config,
      [&](Trainer& trainer, int) {
        const std::string message = message_of<DataError>([&] {
          while (!trainer.finished()) static_cast<void>(trainer.step());
        });
        const std::lock_guard lock(mutex);
        messages.push_back(message);
      },
      documents);
  ASSERT_EQ(messages.size(), 4U);
  for (const std::string& message : messages) {
    EXPECT_NE(message.find("NaN or Inf in the loss on rank"), std::string::npos) << message;
    EXPECT_NE(message.find("tiny[7]"), std::string::npos) << message;
  }
}

TEST(ExpertParallelTrainer, LayoutThatDoesNotFitIsRefusedByName) {
  const TemporaryFolder folder;
  TrainConfig config = fp64_config(folder.file("run"), {4, 3}, 1);
  EXPECT_NE(message_of<InvalidArgument>([&] {
              on_mesh(config, [](Trainer&, int) {});
            }).find("ep is 3, expected a divisor of hdp = 4 (nearest: 2 and 4)"),
            std::string::npos);
}

}  // namespace
}  // namespace meshloom::train
