#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"
#include "meshloom/model/reference.h"

namespace meshloom::model {

inline constexpr const char* kTinyMoe = R"({
  "model_type": "qwen3_moe", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20,
  "moe_intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 3,
  "num_key_value_heads": 1, "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "mlp_only_layers": [0], "attention_bias": true,
  "initializer_range": 0.2})";

inline constexpr const char* kTinyMixtral = R"({
  "model_type": "mixtral", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 7,
  "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
  "num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.2})";

inline constexpr const char* kTinyTied = R"({
  "model_type": "llama", "vocab_size": 29, "hidden_size": 12, "intermediate_size": 20,
  "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
  "tie_word_embeddings": true, "initializer_range": 0.2})";

inline constexpr const char* kTinyLatent = R"({
  "model_type": "deepseek_v3", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20,
  "num_hidden_layers": 2, "num_attention_heads": 2, "first_k_dense_replace": 1,
  "q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4,
  "v_head_dim": 5, "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 2,
  "moe_intermediate_size": 7, "n_shared_experts": 2, "attention_bias": true,
  "initializer_range": 0.2})";

struct TinyModel {
  explicit TinyModel(const char* text, at::ScalarType dtype = at::kDouble)
      : config(ModelConfig::from_json(text)),
        table(parameter_table(config, {0, config.layers}, true, true)),
        values(at::empty({table.elements}, at::TensorOptions().dtype(dtype))) {
    initialize_(values, table, config.initializer_range, 5);
  }
  ModelConfig config;
  ParameterTable table;
  at::Tensor values;
};

/// Documents whose tokens run through the vocabulary in an irregular order.
inline std::vector<Document> tiny_documents(const std::vector<std::int64_t>& lengths,
                                            std::int64_t vocabulary) {
  std::vector<Document> documents;
  for (const std::int64_t length : lengths) {
    Document document;
    for (std::int64_t t = 0; t < length; ++t) {
      document.tokens.push_back((t * t + 3 * length + 5 * t) % vocabulary);
    }
    documents.push_back(std::move(document));
  }
  return documents;
}

}  // namespace meshloom::model
