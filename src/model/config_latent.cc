#include <fmt/format.h>

#include <array>
#include <nlohmann/json.hpp>
#include <string>

#include "model/internal/config_fields.h"

// What config.json says of latent attention and of experts in groups, with DeepSeek-V3's defaults.
namespace meshloom::model::detail {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw DataError(kConfigWhere, message);
}

/// A key whose value is implied by others, as transformers writes it beside them.
void expect_implied(const Fields& fields, const char* key, std::int64_t value) {
  if (fields.get(key) == nullptr) return;
  const std::int64_t given = fields.size(key);
  require(given == value, fmt::format("{} is {}, the other sizes give {}", key, given, value));
}

/// A key that may only have the value that is built.
void expect_text(const Fields& fields, const char* key, const char* built) {
  const std::string given = fields.text(key, built);
  if (given != built) refuse(fmt::format("{} \"{}\" is not built; known: {}", key, given, built));
}

/// Null is no, as Python has it.
bool truth(const Fields& fields, const char* key, bool fallback) {
  return fields.present(key) ? fields.boolean(key, false) : fallback;
}

}  // namespace

void read_latent_attention(ModelConfig& config, const Fields& fields) {
  LatentAttentionConfig& latent = config.latent;
  latent.kv_lora_rank = fields.size("kv_lora_rank", 512);
  latent.q_lora_rank =
      fields.present("q_lora_rank") ? fields.size("q_lora_rank", 0) : std::int64_t{1536};
  latent.qk_nope_head_dim = fields.size("qk_nope_head_dim", 128);
  latent.qk_rope_head_dim = fields.size("qk_rope_head_dim", 64);
  latent.v_head_dim = fields.size("v_head_dim", 128);
  latent.interleaved_rope = truth(fields, "rope_interleave", true);
  config.head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim;
  expect_implied(fields, "head_dim", latent.qk_rope_head_dim);
  expect_implied(fields, "qk_head_dim", config.head_dim);
}

void read_grouped_experts(ModelConfig& config, const Fields& fields) {
  static constexpr std::array<const char*, 8> kOthers{
      "decoder_sparse_step",  "mlp_only_layers",     "num_experts",        "num_local_experts",
      "router_aux_loss_coef", "router_jitter_noise", "use_sliding_window", "max_window_layers"};
  for (const char* key : kOthers) {
    const nlohmann::json* value = fields.get(key);
    if (value != nullptr && !is_off(*value)) {
      refuse(fmt::format("{} in model_type \"{}\" is not built", key, config.model_type));
    }
  }
  MoeConfig& moe = config.moe;
  moe.experts = fields.count("n_routed_experts");
  moe.experts_per_token = fields.size("num_experts_per_tok");
  moe.intermediate_size = fields.size("moe_intermediate_size");
  moe.shared_experts = fields.size("n_shared_experts", 1);
  moe.score = RouterScore::kSigmoid;
  moe.correction_bias = true;
  moe.normalize_top_k = truth(fields, "norm_topk_prob", true);
  moe.weight_scale = fields.number("routed_scaling_factor", 2.5);
  moe.groups = fields.size("n_group", 8);
  moe.top_groups = fields.size("topk_group", 4);
  moe.aux_loss_coefficient = fields.number("aux_loss_alpha", 0.0);
  moe.output_router_logits = fields.boolean("output_router_logits", false);
  expect_text(fields, "scoring_func", "sigmoid");
  expect_text(fields, "topk_method", "noaux_tc");
  if (const std::int64_t step = fields.size("moe_layer_freq", 1); step != 1) {
    refuse(fmt::format("moe_layer_freq = {} is not built", step));
  }
  std::int64_t dense = 3;
  if (fields.get("first_k_dense_replace") != nullptr) {
    dense = fields.token("first_k_dense_replace");
    require(dense >= 0, fmt::format("first_k_dense_replace is {}, expected >= 0", dense));
  }
  for (std::int64_t i = 0; i < config.layers; ++i) {
    config.moe_layers[static_cast<std::size_t>(i)] = i >= dense;
  }
  if (fields.get("num_nextn_predict_layers") != nullptr) {
    config.prediction_layers = fields.token("num_nextn_predict_layers");
    require(config.prediction_layers >= 0,
            fmt::format("num_nextn_predict_layers is {}, expected >= 0", config.prediction_layers));
  }
}

void write_latent_attention(const ModelConfig& config, nlohmann::json& root) {
  const LatentAttentionConfig& latent = config.latent;
  root["q_lora_rank"] =
      latent.q_lora_rank > 0 ? nlohmann::json(latent.q_lora_rank) : nlohmann::json();
  root["kv_lora_rank"] = latent.kv_lora_rank;
  root["qk_nope_head_dim"] = latent.qk_nope_head_dim;
  root["qk_rope_head_dim"] = latent.qk_rope_head_dim;
  root["v_head_dim"] = latent.v_head_dim;
  root["rope_interleave"] = latent.interleaved_rope;
  root["head_dim"] = latent.qk_rope_head_dim;
}

void write_grouped_experts(const ModelConfig& config, nlohmann::json& root) {
  const MoeConfig& moe = config.moe;
  std::int64_t dense = 0;
  while (dense < config.layers && !config.moe_layers[static_cast<std::size_t>(dense)]) ++dense;
  for (std::int64_t i = dense; i < config.layers; ++i) {
    if (config.moe_layers[static_cast<std::size_t>(i)]) continue;
    refuse(
        fmt::format("model_type \"{}\" cannot express a dense layer {} after layers with "
                    "experts",
                    config.model_type, i));
  }
  if (moe.score != RouterScore::kSigmoid || !moe.correction_bias) {
    refuse(fmt::format("model_type \"{}\" cannot express this router", config.model_type));
  }
  root["n_routed_experts"] = moe.experts;
  root["num_experts_per_tok"] = moe.experts_per_token;
  root["moe_intermediate_size"] = moe.intermediate_size;
  root["n_shared_experts"] = moe.shared_experts;
  root["norm_topk_prob"] = moe.normalize_top_k;
  root["routed_scaling_factor"] = moe.weight_scale;
  root["n_group"] = moe.groups;
  root["topk_group"] = moe.top_groups;
  root["first_k_dense_replace"] = dense;
  root["output_router_logits"] = moe.output_router_logits;
  root["scoring_func"] = "sigmoid";
  root["topk_method"] = "noaux_tc";
  root["num_nextn_predict_layers"] = 0;  // their weights are not saved
  if (moe.aux_loss_coefficient != 0.0) root["aux_loss_alpha"] = moe.aux_loss_coefficient;
}

void validate_latent_attention(const ModelConfig& config) {
  const LatentAttentionConfig& latent = config.latent;
  require(
      config.kv_heads == config.heads,
      fmt::format("num_key_value_heads is {}, expected num_attention_heads {}: latent attention "
                  "has a key for each head",
                  config.kv_heads, config.heads));
  require(latent.qk_rope_head_dim > 0 && latent.qk_rope_head_dim % 2 == 0,
          fmt::format("qk_rope_head_dim is {}, expected a positive even number",
                      latent.qk_rope_head_dim));
  require(latent.q_lora_rank >= 0 && latent.qk_nope_head_dim > 0 && latent.v_head_dim > 0,
          "sizes of latent attention must be positive");
  require(config.head_dim == latent.qk_nope_head_dim + latent.qk_rope_head_dim,
          "head_dim is not the sum of its parts");
}

void validate_grouped_experts(const ModelConfig& config) {
  const MoeConfig& moe = config.moe;
  require(moe.groups >= 1 && moe.experts % moe.groups == 0,
          fmt::format("n_group is {}, expected a divisor of {} experts", moe.groups, moe.experts));
  require(moe.top_groups >= 1 && moe.top_groups <= moe.groups,
          fmt::format("topk_group is {}, expected 1 .. n_group {}", moe.top_groups, moe.groups));
  const std::int64_t size = moe.experts / moe.groups;
  require(moe.groups == 1 || size >= 2,
          fmt::format("n_group is {} for {} experts, expected groups of two or more", moe.groups,
                      moe.experts));
  require(moe.experts_per_token <= size * moe.top_groups,
          fmt::format("num_experts_per_tok is {}, expected at most the {} experts of topk_group {} "
                      "groups",
                      moe.experts_per_token, size * moe.top_groups, moe.top_groups));
  require(moe.shared_experts >= 0,
          fmt::format("n_shared_experts is {}, expected >= 0", moe.shared_experts));
}

}  // namespace meshloom::model::detail
