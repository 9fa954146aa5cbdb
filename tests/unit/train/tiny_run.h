#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/core/random.h"
#include "meshloom/data/loader.h"
#include "meshloom/data/sources.h"
#include "meshloom/model/config.h"
#include "meshloom/train/config.h"

namespace meshloom::train {

inline constexpr std::int64_t kTinyVocabulary = 64;

/// A two-layer dense model.
inline model::ModelConfig tiny_dense() {
  return model::ModelConfig::from_json(R"({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "initializer_range": 0.05, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false})");
}

/// A two-layer mixture of four experts, two a token.
inline model::ModelConfig tiny_moe() {
  return model::ModelConfig::from_json(R"({
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu",
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "initializer_range": 0.05, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "attention_bias": false, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": true,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.02})");
}

/// Documents of wildly different lengths whose next token follows from the last.
inline std::vector<data::Document> tiny_documents(std::int64_t count = 60) {
  std::vector<data::Document> result;
  const std::uint64_t key = random_key("documents", 3);
  for (std::int64_t i = 0; i < count; ++i) {
    const double u = random_uniform(key, static_cast<std::uint64_t>(i));
    const auto length = static_cast<std::int64_t>(1 + 120 * u * u * u);
    data::Document document;
    std::int64_t token = i * 7 % kTinyVocabulary;
    for (std::int64_t t = 0; t < length; ++t) {
      document.tokens.push_back(static_cast<std::int32_t>(token));
      token = (token * 5 + 3) % kTinyVocabulary;
    }
    result.push_back(std::move(document));
  }
  return result;
}

inline std::shared_ptr<data::Loader> tiny_loader(
    const std::vector<data::Document>& documents = tiny_documents(), double held_out = 0.0) {
  data::LoaderOptions options;
  options.global_batch_tokens = 256;
  options.max_document_tokens = 128;
  options.seed = 11;
  options.held_out_fraction = held_out;
  options.vocab_size = kTinyVocabulary;
  return std::make_shared<data::Loader>(
      std::vector<data::WeightedSource>{{data::documents(documents, "tiny"), 1.0}}, options);
}

inline TrainConfig tiny_config(const std::string& run, std::int64_t steps = 6) {
  TrainConfig config;
  config.run = run;
  config.seed = 5;
  config.steps = steps;
  config.threads = 1;
  config.deterministic = true;
  config.global_batch_tokens = 256;
  config.data.max_document_tokens = 128;
  config.optimizer.lr = 1e-2;
  config.schedule.warmup = 2;
  config.timeout_seconds = 60;
  return config;
}

}  // namespace meshloom::train
