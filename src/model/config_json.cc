#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "meshloom/core/error.h"
#include "meshloom/model/config.h"
#include "model/internal/config_fields.h"
#include "model/internal/families.h"

namespace meshloom::model {
namespace detail {
namespace {

constexpr std::array<Family, 7> kFamilies{{
    {"llama", "LlamaForCausalLM", 1e-6, 1e4, 0, 0, true, false, false, false, 0, false, false},
    {"mistral", "MistralForCausalLM", 1e-6, 1e4, 8, 0, false, false, false, false, 4096, true,
     false},
    {"qwen2", "Qwen2ForCausalLM", 1e-6, 1e4, 32, 0, false, true, true, false, 4096, true, false},
    {"qwen3", "Qwen3ForCausalLM", 1e-6, 1e4, 32, 128, true, true, true, false, 4096, true, false},
    {"mixtral", "MixtralForCausalLM", 1e-5, 1e6, 8, 0, false, false, false, true, 0, true, false},
    {"qwen3_moe", "Qwen3MoeForCausalLM", 1e-6, 1e4, 4, 0, true, true, false, true, 4096, true,
     false},
    {"deepseek_v3", "DeepseekV3ForCausalLM", 1e-6, 1e4, 0, 0, true, false, false, true, 0, false,
     true},
}};

}  // namespace

void refuse(const std::string& what) { throw NotSupported(kConfigWhere, what); }

const Family& find_family(const std::string& name) {
  std::vector<std::string_view> known;
  for (const Family& family : kFamilies) {
    if (family.name == name) return family;
    known.push_back(family.name);
  }
  refuse(fmt::format("model_type \"{}\" is not built; known: {}", name, fmt::join(known, ", ")));
}

}  // namespace detail

std::string ModelConfig::to_json() const {
  using Json = nlohmann::json;
  const detail::Family& family = detail::find_family(model_type);
  const auto id = [](std::int64_t token) { return token < 0 ? Json() : Json(token); };
  Json root{{"model_type", model_type},
            {"architectures", {family.architecture}},
            {"vocab_size", vocab_size},
            {"hidden_size", hidden_size},
            {"intermediate_size", intermediate_size},
            {"num_hidden_layers", layers},
            {"num_attention_heads", heads},
            {"num_key_value_heads", kv_heads},
            {"head_dim", head_dim},
            {"hidden_act", "silu"},
            {"attention_dropout", 0.0},
            {"rms_norm_eps", rms_norm_eps},
            {"initializer_range", initializer_range},
            {"tie_word_embeddings", tie_word_embeddings},
            {"use_cache", true},
            {"bos_token_id", id(bos_token_id)},
            {"eos_token_id", id(eos_token_id)},
            {"pad_token_id", id(pad_token_id)},
            {"torch_dtype", dtype},
            {"rope_theta", rope.theta},
            {"rope_scaling", Json()}};
  if (!more_eos_token_ids.empty()) {
    root["eos_token_id"] = Json::array({eos_token_id});
    for (const std::int64_t token : more_eos_token_ids) root["eos_token_id"].push_back(token);
  }
  if (max_position_embeddings > 0) root["max_position_embeddings"] = max_position_embeddings;
  const auto expect = [&](bool condition, const char* what) {
    if (!condition)
      detail::refuse(fmt::format("model_type \"{}\" cannot express {}", model_type, what));
  };
  expect(family.attention_bias_key ? qkv_bias == output_bias
                                   : !output_bias && qkv_bias == (family.name == "qwen2"),
         "these attention biases");
  expect(!mlp_bias || family.name == "llama", "mlp_bias");
  expect(qk_norm == (family.name == "qwen3" || family.name == "qwen3_moe"), "this qk_norm");
  if (family.attention_bias_key) root["attention_bias"] = qkv_bias;
  if (family.name == "llama") root["mlp_bias"] = mlp_bias;

  const auto windowed = std::find_if(windows.begin(), windows.end(), [](auto w) { return w > 0; });
  const std::int64_t window = windowed == windows.end() ? 0 : *windowed;
  bool uniform = true;
  bool one_size = true;
  for (const std::int64_t w : windows) {
    uniform = uniform && w == window;
    one_size = one_size && (w == 0 || w == window);
  }
  expect(one_size && (uniform || family.layer_types_key), "these windows");
  expect(window == 0 || family.window_key, "a sliding window");
  if (family.window_key) root["sliding_window"] = window > 0 ? Json(window) : Json();
  if (family.use_window_key) root["use_sliding_window"] = window > 0;
  if (family.layer_types_key) {
    Json types = Json::array();
    std::int64_t full = 0;
    while (full < layers && windows[std::size_t(full)] == 0) ++full;
    for (const std::int64_t w : windows) {
      types.push_back(w > 0 ? "sliding_attention" : "full_attention");
    }
    root["layer_types"] = types;
    root["max_window_layers"] = full;
  }
  expect(family.latent_attention == (latent.kv_lora_rank > 0), "this attention");
  if (family.latent_attention) {
    detail::write_latent_attention(*this, root);
    detail::write_grouped_experts(*this, root);
  } else if (family.moe) {
    expect(moe.groups == 1 && moe.weight_scale == 1.0 && !moe.correction_bias &&
               moe.shared_experts == 0,
           "these expert settings");
    root["num_experts_per_tok"] = moe.experts_per_token;
    root["router_aux_loss_coef"] = moe.aux_loss_coefficient;
    root["output_router_logits"] = moe.output_router_logits;
    expect(moe.score == RouterScore::kSoftmax, "sigmoid router scores");
    if (family.name == "mixtral") {
      root["num_local_experts"] = moe.experts;
      expect(moe.intermediate_size == intermediate_size && moe.normalize_top_k,
             "these expert settings");
    } else {
      root["num_experts"] = moe.experts;
      root["moe_intermediate_size"] = moe.intermediate_size;
      root["norm_topk_prob"] = moe.normalize_top_k;
      root["decoder_sparse_step"] = 1;
      root["mlp_only_layers"] = Json::array();
    }
    for (std::size_t i = 0; i < moe_layers.size(); ++i) {
      if (moe_layers[i]) continue;
      expect(family.name != "mixtral", "dense layers");
      root["mlp_only_layers"].push_back(i);
    }
  } else {
    expect(moe.experts == 0, "experts");
  }
  if (rope.type != "default") {
    Json scaling{{"rope_type", rope.type}, {"factor", rope.factor}};
    if (rope.type != "linear") {
      scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings;
    }
    if (rope.type == "llama3") {
      scaling["low_freq_factor"] = rope.low_freq_factor;
      scaling["high_freq_factor"] = rope.high_freq_factor;
    } else if (rope.type == "yarn") {
      scaling["beta_fast"] = rope.beta_fast;
      scaling["beta_slow"] = rope.beta_slow;
      if (rope.attention_factor != 0) scaling["attention_factor"] = rope.attention_factor;
      if (rope.mscale != 0) scaling["mscale"] = rope.mscale;
      if (rope.mscale_all_dim != 0) scaling["mscale_all_dim"] = rope.mscale_all_dim;
      if (!rope.truncate) scaling["truncate"] = false;
    }
    root["rope_scaling"] = scaling;
  }
  return root.dump(2) + "\n";
}

}  // namespace meshloom::model
