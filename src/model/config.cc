#include "meshloom/model/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "meshloom/core/error.h"
#include "meshloom/model/parameters.h"
#include "model/internal/config_fields.h"
#include "model/internal/families.h"
#include "model/internal/files.h"

namespace meshloom::model {
namespace {

using Json = nlohmann::json;
using detail::Family;
using detail::Fields;
using detail::find_family;
using detail::is_off;
using detail::kConfigWhere;
using detail::refuse;
using detail::wrong_type;

std::set<std::string_view> split_words(std::string_view text) {
  std::set<std::string_view> words;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(' '), text.size());
    if (end > 0) words.insert(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return words;
}

/// Keys that say nothing about the mathematics of a training step.
const std::set<std::string_view>& harmless_keys() {
  static const std::set<std::string_view> keys = split_words(
      "add_cross_attention architectures attn_implementation auto_map bad_words_ids "
      "begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size "
      "decoder_start_token_id diversity_penalty do_sample early_stopping "
      "encoder_no_repeat_ngram_size experts_implementation "
      "exponential_decay_length_penalty finetuning_task forced_bos_token_id "
      "forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty "
      "max_length min_length model_max_length name_or_path no_repeat_ngram_size "
      "num_beam_groups num_beams num_return_sequences output_attentions "
      "output_hidden_states output_scores prefix pretraining_tp problem_type prune_heads "
      "remove_invalid_values repetition_penalty return_dict return_dict_in_generate "
      "sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
      "tokenizer_class top_k top_p torchscript transformers_version transformers.js_config "
      "typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn ");
  return keys;
}

const std::set<std::string_view>& known_keys() {
  static const std::set<std::string_view> keys = split_words(
      "attention_bias attention_dropout bos_token_id decoder_sparse_step dtype "
      "eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size "
      "is_causal layer_types max_position_embeddings max_window_layers mlp_bias mlp_only_layers "
      "model_type moe_intermediate_size norm_topk_prob num_attention_heads num_experts "
      "num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
      "original_max_position_embeddings output_router_logits pad_token_id "
      "partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta "
      "router_aux_loss_coef router_jitter_noise sliding_window tie_word_embeddings "
      "torch_dtype use_sliding_window vocab_size ");
  return keys;
}

/// Keys that only a family with latent attention knows.
const std::set<std::string_view>& latent_keys() {
  static const std::set<std::string_view> keys = split_words(
      "aux_loss_alpha ep_size first_k_dense_replace kv_lora_rank moe_layer_freq n_group "
      "n_routed_experts n_shared_experts num_nextn_predict_layers q_lora_rank qk_head_dim "
      "qk_nope_head_dim qk_rope_head_dim rope_interleave routed_scaling_factor scoring_func "
      "seq_aux topk_group topk_method v_head_dim");
  return keys;
}

void refuse_unknown(const Json& root, const Family& family) {
  for (const auto& [key, value] : root.items()) {
    if (key.starts_with('_') || known_keys().contains(key) || harmless_keys().contains(key)) {
      continue;
    }
    if (family.latent_attention && latent_keys().contains(key)) continue;
    if (!is_off(value)) refuse(fmt::format("key \"{}\" = {} is not built", key, value.dump()));
  }
}

RopeConfig read_rope(const Json& root, const Fields& fields, const Family& family) {
  RopeConfig rope;
  // transformers 4 writes rope_scaling (null for the default form) beside rope_theta; 5 writes
  // rope_parameters, but still prefers rope_scaling where both are given.
  const Json empty = Json::object();
  const Json* parameters = fields.get("rope_scaling");
  const char* name = "rope_scaling";
  if (parameters == nullptr || parameters->empty()) {
    parameters = fields.get("rope_parameters");
    name = "rope_parameters";
  }
  if (parameters == nullptr) parameters = &empty;
  if (!parameters->is_object()) wrong_type(name, "an object", *parameters);
  for (const auto& [key, value] : parameters->items()) {
    if (value.is_object())
      refuse(fmt::format("{}.{}: rope per layer type is not built", name, key));
    static const std::set<std::string_view> known{"attention_factor",
                                                  "beta_fast",
                                                  "beta_slow",
                                                  "factor",
                                                  "high_freq_factor",
                                                  "low_freq_factor",
                                                  "mscale",
                                                  "mscale_all_dim",
                                                  "original_max_position_embeddings",
                                                  "partial_rotary_factor",
                                                  "rope_theta",
                                                  "rope_type",
                                                  "truncate",
                                                  "type"};
    if (!known.contains(key) && !is_off(value)) {
      refuse(fmt::format("key \"{}.{}\" = {} is not built", name, key, value.dump()));
    }
  }
  const Fields inner(*parameters, std::string(name) + ".");
  rope.type = inner.text("rope_type", inner.text("type", "default").c_str());
  rope.theta = inner.number("rope_theta", fields.number("rope_theta", family.theta));
  if (!(rope.theta > 0)) wrong_type("rope_theta", "a positive number", rope.theta);
  const double partial =
      inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0));
  if (partial != 1.0) refuse(fmt::format("partial_rotary_factor = {} is not built", partial));
  if (rope.type == "default") return rope;
  if (family.latent_attention && rope.type != "yarn" && inner.number("mscale_all_dim", 0.0) != 0) {
    refuse(fmt::format("{}.mscale_all_dim with rope_type \"{}\" is not built", name, rope.type));
  }
  if (rope.type != "linear" && rope.type != "llama3" && rope.type != "yarn") {
    refuse(fmt::format("rope_type \"{}\" is not built; known: default, linear, llama3, yarn",
                       rope.type));
  }
  const std::int64_t longest = fields.size("max_position_embeddings", 0);
  if (rope.type != "linear") {
    // A top-level value wins, as in transformers 5.
    const char* original = "original_max_position_embeddings";
    rope.original_max_position_embeddings =
        root.contains(original) ? fields.size(original) : inner.size(original, longest);
    if (rope.original_max_position_embeddings == 0) {
      throw DataError(kConfigWhere, "max_position_embeddings is missing");
    }
  }
  const bool derive = rope.type == "yarn" && inner.get("factor") == nullptr && longest > 0;
  rope.factor = derive ? static_cast<double>(longest) /
                             static_cast<double>(rope.original_max_position_embeddings)
                       : inner.number("factor");
  if (!(rope.factor > 0)) wrong_type(std::string(name) + ".factor", "positive", rope.factor);
  if (rope.type == "llama3") {
    rope.low_freq_factor = inner.number("low_freq_factor");
    rope.high_freq_factor = inner.number("high_freq_factor");
  } else if (rope.type == "yarn") {
    const auto nonzero = [](double value, double fallback) {
      return value != 0 ? value : fallback;
    };
    rope.beta_fast = nonzero(inner.number("beta_fast", 0.0), 32.0);
    rope.beta_slow = nonzero(inner.number("beta_slow", 0.0), 1.0);
    rope.attention_factor = inner.number("attention_factor", 0.0);
    rope.mscale = inner.number("mscale", 0.0);
    rope.mscale_all_dim = inner.number("mscale_all_dim", 0.0);
    rope.truncate = inner.boolean("truncate", true);
  }
  return rope;
}

std::vector<std::int64_t> read_windows(const Fields& fields, const Family& family,
                                       std::int64_t layers) {
  std::int64_t window = 0;
  if (fields.get("sliding_window") != nullptr) {
    window = fields.size("sliding_window", 0);
  } else if (!fields.present("sliding_window")) {
    window = family.default_window;
  }
  if (family.use_window_key && !fields.boolean("use_sliding_window", false)) window = 0;
  if (!family.use_window_key && fields.boolean("use_sliding_window", false)) {
    refuse(fmt::format("use_sliding_window in model_type \"{}\" is not built", family.name));
  }
  if (!family.window_key && window > 0) {
    refuse(fmt::format("sliding_window in model_type \"{}\" is not built", family.name));
  }
  std::vector<std::int64_t> result(static_cast<std::size_t>(layers), window);
  const Json* types = fields.get("layer_types");
  if (types == nullptr) {
    if (family.layer_types_key && window > 0) {
      const Json* first = fields.get("max_window_layers");
      if (first != nullptr && !first->is_number_integer()) {
        wrong_type("max_window_layers", "an integer", *first);
      }
      const std::int64_t full = first == nullptr ? 28 : first->get<std::int64_t>();
      for (std::int64_t i = 0; i < std::min(full, layers); ++i) result[std::size_t(i)] = 0;
    }
    return result;
  }
  if (!types->is_array() || types->size() != result.size()) {
    wrong_type("layer_types", fmt::format("a list of {} names", layers), *types);
  }
  for (std::size_t i = 0; i < result.size(); ++i) {
    const Json& type = (*types)[i];
    if (type == "full_attention") {
      if (!family.layer_types_key && window > 0) {
        refuse(
            fmt::format("layer_types[{}] = full_attention beside sliding_window in model_type "
                        "\"{}\" is not built",
                        i, family.name));
      }
      result[i] = 0;
    } else if (type == "sliding_attention") {
      if (window == 0) {
        throw DataError(
            kConfigWhere,
            fmt::format("layer_types[{}] is sliding_attention, but no sliding_window "
                        "is set{}",
                        i, family.use_window_key ? " or use_sliding_window is off" : ""));
      }
    } else {
      refuse(fmt::format("layer_types[{}] = {} is not built", i, type.dump()));
    }
  }
  return result;
}

void read_moe(ModelConfig& config, const Fields& fields) {
  const bool mixtral = config.model_type == "mixtral";
  MoeConfig& moe = config.moe;
  moe.experts = fields.get("num_local_experts") != nullptr || mixtral
                    ? fields.count("num_local_experts")
                    : fields.count("num_experts");
  moe.experts_per_token = fields.size("num_experts_per_tok");
  moe.intermediate_size = mixtral ? config.intermediate_size : fields.size("moe_intermediate_size");
  moe.normalize_top_k = mixtral || fields.boolean("norm_topk_prob", false);
  moe.aux_loss_coefficient = fields.number("router_aux_loss_coef", 0.001);
  moe.output_router_logits = fields.boolean("output_router_logits", false);
  if (fields.number("router_jitter_noise", 0.0) != 0.0) refuse("router_jitter_noise is not built");
  config.moe_layers.assign(static_cast<std::size_t>(config.layers), true);
  if (mixtral) return;
  const std::int64_t step = fields.size("decoder_sparse_step", 1);
  for (std::int64_t i = 0; i < config.layers; ++i) {
    config.moe_layers[std::size_t(i)] = (i + 1) % step == 0;
  }
  if (const Json* dense = fields.get("mlp_only_layers")) {
    if (!dense->is_array()) wrong_type("mlp_only_layers", "a list of layer numbers", *dense);
    for (const Json& layer : *dense) {
      if (!layer.is_number_integer()) wrong_type("mlp_only_layers", "layer numbers", *dense);
      const auto index = layer.get<std::int64_t>();
      if (index >= 0 && index < config.layers) config.moe_layers[std::size_t(index)] = false;
    }
  }
}

void read_tokens(ModelConfig& config, const Fields& fields) {
  config.bos_token_id = fields.token("bos_token_id");
  config.pad_token_id = fields.token("pad_token_id");
  const Json* eos = fields.get("eos_token_id");
  if (eos == nullptr || !eos->is_array()) {
    config.eos_token_id = fields.token("eos_token_id");
    return;
  }
  for (const Json& id : *eos) {
    if (!id.is_number_integer()) wrong_type("eos_token_id", "integers", *eos);
    config.more_eos_token_ids.push_back(id.get<std::int64_t>());
  }
  if (config.more_eos_token_ids.empty()) return;
  config.eos_token_id = config.more_eos_token_ids.front();
  config.more_eos_token_ids.erase(config.more_eos_token_ids.begin());
}

}  // namespace

ModelConfig ModelConfig::from_json(const std::string& text) {
  const Json root = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded() || !root.is_object()) {
    throw DataError(kConfigWhere, "not a JSON object");
  }
  const Fields fields(root, "");
  ModelConfig config;
  config.model_type = fields.text("model_type", "");
  if (config.model_type.empty()) throw DataError(kConfigWhere, "model_type is missing");
  const Family& family = find_family(config.model_type);
  refuse_unknown(root, family);
  const std::string activation = fields.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    refuse(fmt::format("hidden_act \"{}\" is not built; known: silu", activation));
  }
  if (!fields.boolean("is_causal", true)) refuse("is_causal = false is not built");
  if (const double dropout = fields.number("attention_dropout", 0.0); dropout != 0.0) {
    refuse(fmt::format("attention_dropout = {} is not built", dropout));
  }
  config.vocab_size = fields.size("vocab_size");
  config.hidden_size = fields.size("hidden_size");
  config.intermediate_size = fields.size("intermediate_size");
  config.layers = fields.count("num_hidden_layers");
  config.heads = fields.size("num_attention_heads");
  // Absent takes the family's default, null one per head; both as transformers does.
  const std::int64_t kv_default =
      fields.present("num_key_value_heads") ? 0 : family.default_kv_heads;
  config.kv_heads = fields.size("num_key_value_heads", kv_default != 0 ? kv_default : config.heads);
  const std::int64_t head_default = fields.present("head_dim") ? 0 : family.default_head_dim;
  config.head_dim =
      fields.size("head_dim", head_default != 0 ? head_default : config.hidden_size / config.heads);
  if (family.latent_attention) detail::read_latent_attention(config, fields);
  config.rms_norm_eps = fields.number("rms_norm_eps", family.eps);
  config.initializer_range = fields.number("initializer_range", 0.02);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
  const bool bias = fields.boolean("attention_bias", false);
  if (bias && !family.attention_bias_key) {
    refuse(fmt::format("attention_bias in model_type \"{}\" is not built", family.name));
  }
  config.qkv_bias = bias || family.name == "qwen2";
  config.output_bias = bias;
  config.mlp_bias = fields.boolean("mlp_bias", false);
  if (config.mlp_bias && family.name != "llama") {
    refuse(fmt::format("mlp_bias in model_type \"{}\" is not built", family.name));
  }
  config.qk_norm = family.name == "qwen3" || family.name == "qwen3_moe";
  config.windows = read_windows(fields, family, config.layers);
  config.moe_layers.assign(static_cast<std::size_t>(config.layers), false);
  config.rope = read_rope(root, fields, family);
  config.max_position_embeddings = fields.size("max_position_embeddings", 0);
  if (family.latent_attention) {
    detail::read_grouped_experts(config, fields);
  } else if (family.moe) {
    read_moe(config, fields);
  } else {
    for (const char* key : {"num_experts", "num_local_experts"}) {
      if (fields.get(key) != nullptr && !is_off(*fields.get(key))) {
        refuse(fmt::format("{} in model_type \"{}\" is not built", key, family.name));
      }
    }
  }
  read_tokens(config, fields);
  config.dtype = fields.text("dtype", fields.text("torch_dtype", "float32").c_str());
  config.validate();
  return config;
}

ModelConfig ModelConfig::load(const std::string& path) {
  const std::string text = detail::read_file(path, kConfigWhere);
  const auto message = [&](const Error& error) {
    return path + ": " + std::string(error.what()).substr(error.where().size() + 3);
  };
  try {
    return from_json(text);
  } catch (const DataError& error) {
    throw DataError(kConfigWhere, message(error));
  } catch (const NotSupported& error) {
    throw NotSupported(kConfigWhere, message(error));
  }
}

void ModelConfig::validate() const {
  const auto require = [](bool condition, const std::string& message) {
    if (!condition) throw DataError(kConfigWhere, message);
  };
  require(vocab_size > 0 && hidden_size > 0 && intermediate_size > 0 && layers > 0 && heads > 0 &&
              kv_heads > 0,
          "sizes must be positive");
  require(heads % kv_heads == 0,
          fmt::format("num_attention_heads is {}, expected a multiple of num_key_value_heads {}",
                      heads, kv_heads));
  if (latent.kv_lora_rank > 0) {
    detail::validate_latent_attention(*this);
  } else {
    require(head_dim > 0 && head_dim % 2 == 0,
            fmt::format("head_dim is {}, expected a positive even number", head_dim));
  }
  require(rms_norm_eps >= 0, fmt::format("rms_norm_eps is {}, expected >= 0", rms_norm_eps));
  require(windows.size() == std::size_t(layers) && moe_layers.size() == std::size_t(layers),
          "windows and moe_layers have one entry a layer");
  for (const bool is_moe : moe_layers) {
    if (!is_moe) continue;
    require(moe.experts > 0 && moe.intermediate_size > 0, "a MoE layer without experts");
    require(moe.experts_per_token > 0 && moe.experts_per_token <= moe.experts,
            fmt::format("num_experts_per_tok is {}, expected 1 .. {}", moe.experts_per_token,
                        moe.experts));
  }
  if (moe.experts > 0) detail::validate_grouped_experts(*this);
}

std::int64_t ModelConfig::rope_dim() const {
  return latent.kv_lora_rank > 0 ? latent.qk_rope_head_dim : head_dim;
}

std::int64_t ModelConfig::value_dim() const {
  return latent.kv_lora_rank > 0 ? latent.v_head_dim : head_dim;
}

std::int64_t ModelConfig::parameter_count() const {
  return parameter_table(*this, {0, layers}, true, true).elements;
}

}  // namespace meshloom::model
