#include "meshloom/model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "files.h"
#include "meshloom/core/error.h"

namespace meshloom::model {
namespace {

using Json = nlohmann::json;

constexpr const char* kFamilyNames[] = {"llama",   "mistral",   "qwen2",      "qwen3",
                                        "mixtral", "qwen3_moe", "deepseek_v3"};

/// The smallest config of a family: everything else takes the family's own default.
Json minimal(const std::string& family) {
  Json root{{"model_type", family},    {"vocab_size", 64},       {"hidden_size", 32},
            {"intermediate_size", 48}, {"num_hidden_layers", 3}, {"num_attention_heads", 4},
            {"num_key_value_heads", 2}};
  if (family == "mixtral") root.update({{"num_local_experts", 4}, {"num_experts_per_tok", 2}});
  if (family == "qwen3_moe") {
    root.update({{"num_experts", 4}, {"num_experts_per_tok", 2}, {"moe_intermediate_size", 24}});
  }
  if (family == "deepseek_v3") {
    root.erase("num_key_value_heads");
    root.update({{"n_routed_experts", 8},
                 {"n_group", 4},
                 {"topk_group", 2},
                 {"num_experts_per_tok", 2},
                 {"moe_intermediate_size", 24}});
  }
  return root;
}

Json with(const std::string& family, const Json& more) {
  Json root = minimal(family);
  for (const auto& [key, value] : more.items()) root[key] = value;
  return root;
}

ModelConfig parse(const Json& root) { return ModelConfig::from_json(root.dump()); }

struct Refusal {
  const char* family;
  Json more;
  std::string expected;  ///< in the message
};

template <class Failure>
void expect_refused(const std::vector<Refusal>& cases) {
  for (const Refusal& c : cases) {
    const Json root = with(c.family, c.more);
    const std::string message = message_of<Failure>([&] { (void)parse(root); });
    EXPECT_NE(message.find(c.expected), std::string::npos)
        << c.family << " with " << c.more.dump() << "\n  said: \"" << message
        << "\"\n  expected: \"" << c.expected << "\"";
  }
}

TEST(ModelConfigRefusals, OtherFamiliesAreRefusedByName) {
  for (const char* other : {"gpt2", "deepseek_v2", "gemma3_text", "gpt_oss", "llama4_text",
                            "qwen2_moe", "qwen3_next", "phi3", "Llama", "qwen3_vl"}) {
    const std::string message = message_of<NotSupported>([&] {
      (void)parse(with("llama", {{"model_type", other}}));
    });
    EXPECT_NE(message.find(std::string("\"") + other + "\" is not built"), std::string::npos)
        << message;
    for (const char* known : kFamilyNames) EXPECT_NE(message.find(known), std::string::npos);
  }
}

TEST(ModelConfigRefusals, FeaturesThatChangeTheMathematicsAreRefusedByName) {
  const Json mrope{{"rope_type", "default"}, {"mrope_section", {16, 24, 24}}};
  expect_refused<NotSupported>({
      {"llama", {{"hidden_act", "gelu"}}, "hidden_act \"gelu\""},
      {"mixtral", {{"hidden_act", "relu"}}, "hidden_act \"relu\""},
      {"llama", {{"attention_dropout", 0.1}}, "attention_dropout"},
      {"llama", {{"hidden_dropout", 0.1}}, "hidden_dropout"},
      {"llama", {{"is_causal", false}}, "is_causal"},
      {"llama", {{"attention_sinks", true}}, "attention_sinks"},
      {"qwen3", {{"attention_sink_tokens", 4}}, "attention_sink_tokens"},
      {"llama", {{"attention_chunk_size", 8192}}, "attention_chunk_size"},
      {"llama", {{"attn_logit_softcapping", 50.0}}, "attn_logit_softcapping"},
      {"llama", {{"final_logit_softcapping", 30.0}}, "final_logit_softcapping"},
      {"llama", {{"logits_scaling", 8.0}}, "logits_scaling"},
      {"llama", {{"embedding_multiplier", 12.0}}, "embedding_multiplier"},
      {"llama", {{"residual_multiplier", 0.2}}, "residual_multiplier"},
      {"llama", {{"clip_qkv", 8.0}}, "clip_qkv"},
      {"llama", {{"use_qk_norm", true}}, "use_qk_norm"},
      {"llama", {{"kv_lora_rank", 512}}, "kv_lora_rank"},
      {"llama", {{"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {"llama", {{"sliding_window", 128}}, "sliding_window"},
      {"llama",
       {{"quantization_config", {{"quant_method", "awq"}, {"bits", 4}}}},
       "quantization_config"},
      {"qwen3_moe", {{"n_shared_experts", 1}}, "n_shared_experts"},
      {"qwen3_moe", {{"n_group", 4}}, "n_group"},
      {"qwen3_moe", {{"routed_scaling_factor", 2.5}}, "routed_scaling_factor"},
      {"qwen3_moe", {{"scoring_func", "sigmoid"}}, "scoring_func"},
      {"mixtral", {{"router_jitter_noise", 0.01}}, "router_jitter_noise"},
      {"deepseek_v3", {{"scoring_func", "softmax"}}, "scoring_func \"softmax\""},
      {"deepseek_v3", {{"topk_method", "greedy"}}, "topk_method \"greedy\""},
      {"deepseek_v3", {{"moe_layer_freq", 2}}, "moe_layer_freq"},
      {"deepseek_v3", {{"sliding_window", 128}}, "sliding_window"},
      {"deepseek_v3", {{"mlp_bias", true}}, "mlp_bias"},
      {"deepseek_v3", {{"num_experts", 8}}, "num_experts"},
      {"deepseek_v3", {{"mlp_only_layers", {1}}}, "mlp_only_layers"},
      {"deepseek_v3", {{"router_aux_loss_coef", 0.01}}, "router_aux_loss_coef"},
      {"deepseek_v3", {{"index_topk", 2048}}, "index_topk"},
      {"deepseek_v3", {{"quantization_config", {{"quant_method", "fp8"}}}}, "quantization_config"},
      {"deepseek_v3",
       {{"max_position_embeddings", 64},
        {"rope_parameters", {{"rope_type", "linear"}, {"factor", 2.0}, {"mscale_all_dim", 1.0}}}},
       "rope_parameters.mscale_all_dim with rope_type \"linear\""},
      {"llama", {{"num_experts", 8}}, "num_experts"},
      {"mistral", {{"num_local_experts", 8}}, "num_local_experts"},
      {"mistral", {{"attention_bias", true}}, "attention_bias"},
      {"mixtral", {{"attention_bias", true}}, "attention_bias"},
      {"qwen2", {{"mlp_bias", true}}, "mlp_bias"},
      {"mistral", {{"use_sliding_window", true}, {"sliding_window", 8}}, "use_sliding_window"},
      {"qwen3",
       {{"layer_types", {"full_attention", "linear_attention", "full_attention"}}},
       "layer_types[1] = \"linear_attention\""},
      {"qwen3",
       {{"layer_types", {"full_attention", "full_attention", "chunked_attention"}}},
       "layer_types[2] = \"chunked_attention\""},
      {"llama", {{"rope_parameters", mrope}}, "rope_parameters.mrope_section"},
      {"qwen2", {{"rope_scaling", mrope}}, "rope_scaling.mrope_section"},
      {"llama",
       {{"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}}},
       "rope per layer type"},
      {"llama",
       {{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}}},
       "partial_rotary_factor"},
  });
}

TEST(ModelConfigRefusals, RopeFormsThatAreNotBuiltAreRefusedByName) {
  for (const char* form : {"dynamic", "longrope", "su", "mrope", "proportional", "ntk"}) {
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      for (const char* type : {"type", "rope_type"}) {
        expect_refused<NotSupported>({{"llama", {{key, {{type, form}, {"factor", 2.0}}}}, form}});
      }
    }
  }
}

TEST(ModelConfigRefusals, MalformedFieldsNameTheKeyAndWhatWasExpected) {
  const auto layers = [](Json types) { return Json{{"layer_types", std::move(types)}}; };
  expect_refused<DataError>({
      {"llama", {{"hidden_size", "32"}}, "hidden_size is \"32\", expected a positive integer"},
      {"llama", {{"hidden_size", -4}}, "hidden_size is -4"},
      {"llama", {{"hidden_size", 0}}, "hidden_size is 0"},
      {"llama", {{"hidden_size", 32.5}}, "hidden_size is 32.5"},
      {"llama", {{"hidden_size", nullptr}}, "hidden_size is missing"},
      {"llama", {{"vocab_size", 1LL << 40}}, "vocab_size is 1099511627776"},
      {"llama", {{"vocab_size", 18446744073709551615ULL}}, "vocab_size"},
      {"llama", {{"num_hidden_layers", 2000000000}}, "num_hidden_layers is 2000000000"},
      {"qwen3_moe", {{"num_experts", 2000000000}}, "num_experts is 2000000000"},
      {"llama", {{"num_key_value_heads", 3}}, "multiple of num_key_value_heads 3"},
      {"llama", {{"head_dim", 7}}, "head_dim is 7"},
      {"llama", {{"rms_norm_eps", "small"}}, "rms_norm_eps"},
      {"llama", {{"rms_norm_eps", -1e-6}}, "rms_norm_eps is -1e-06"},
      {"llama", {{"tie_word_embeddings", 1}}, "tie_word_embeddings is 1, expected true or false"},
      {"llama", {{"model_type", 3}}, "model_type is 3, expected a string"},
      {"llama", {{"rope_theta", 0}}, "rope_theta"},
      {"llama", {{"rope_parameters", "default"}}, "rope_parameters is \"default\""},
      {"llama", {{"rope_parameters", {{"rope_type", "linear"}}}}, "rope_parameters.factor"},
      {"llama",
       {{"rope_scaling", {{"rope_type", "linear"}, {"factor", -2}}}},
       "rope_scaling.factor"},
      {"llama",
       {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}},
       "max_position_embeddings is missing"},
      {"mistral", {{"sliding_window", 0}}, "sliding_window is 0"},
      {"qwen3", layers({"full_attention"}), "expected a list of 3 names"},
      {"qwen3", layers({"full_attention", "sliding_attention", "full_attention"}),
       "layer_types[1] is sliding_attention, but no sliding_window"},
      {"qwen3_moe", {{"num_experts_per_tok", 5}}, "num_experts_per_tok is 5, expected 1 .. 4"},
      {"qwen3_moe", {{"num_experts_per_tok", nullptr}}, "num_experts_per_tok is missing"},
      {"qwen3_moe", {{"mlp_only_layers", "none"}}, "mlp_only_layers"},
      {"llama", {{"eos_token_id", {1, "two"}}}, "eos_token_id"},
      {"deepseek_v3", {{"n_routed_experts", nullptr}}, "n_routed_experts is missing"},
      {"deepseek_v3", {{"n_shared_experts", 0}}, "n_shared_experts is 0"},
      {"deepseek_v3", {{"n_group", 3}}, "n_group is 3, expected a divisor of 8"},
      {"deepseek_v3", {{"n_group", 8}, {"topk_group", 8}}, "groups of two or more"},
      {"deepseek_v3", {{"topk_group", 5}}, "topk_group is 5, expected 1 .. n_group 4"},
      {"deepseek_v3",
       {{"topk_group", 1}, {"num_experts_per_tok", 3}},
       "num_experts_per_tok is 3, expected at most the 2 experts"},
      {"deepseek_v3", {{"first_k_dense_replace", -1}}, "first_k_dense_replace is -1"},
      {"deepseek_v3", {{"num_key_value_heads", 2}}, "latent attention has a key for each head"},
      {"deepseek_v3", {{"head_dim", 192}}, "head_dim is 192, the other sizes give 64"},
      {"deepseek_v3", {{"qk_head_dim", 64}}, "qk_head_dim is 64, the other sizes give 192"},
      {"deepseek_v3", {{"qk_rope_head_dim", 7}}, "qk_rope_head_dim is 7"},
  });
  EXPECT_THROW((void)ModelConfig::from_json("[]"), DataError);
  EXPECT_THROW((void)ModelConfig::from_json(""), DataError);
  EXPECT_THROW((void)ModelConfig::from_json("{\"model_type\": \"llama\""), DataError);
  EXPECT_THROW((void)ModelConfig::from_json("{\"model_type\": \"ll\xff\"}"), Error);
}

TEST(ModelConfigRefusals, FileErrorsNameTheFile) {
  const TemporaryFolder folder;
  const std::string path = folder.file("config.json");
  const auto load = [&] { (void)ModelConfig::load(path); };
  EXPECT_NE(message_of<IoError>(load).find(path), std::string::npos);
  write_bytes(path, "{");
  EXPECT_NE(message_of<DataError>(load).find(path), std::string::npos);
  write_bytes(path, with("llama", {{"hidden_act", "gelu"}}).dump());
  const std::string message = message_of<NotSupported>(load);
  EXPECT_NE(message.find(path + ": hidden_act \"gelu\""), std::string::npos) << message;
  EXPECT_NE(message_of<IoError>([&] { (void)ModelConfig::load(folder.path()); }), "");
}

TEST(ModelConfig, KeysThatChangeNothingAreTaken) {
  for (const char* family : kFamilyNames) {
    EXPECT_NO_THROW((void)parse(with(family, {{"architectures", {"X"}},
                                              {"transformers_version", "4.57.1"},
                                              {"use_cache", false},
                                              {"_name_or_path", "somewhere"},
                                              {"_attn_implementation_autoset", true},
                                              {"pretraining_tp", 2},
                                              {"unheard_of", nullptr},
                                              {"not_used", false},
                                              {"none", 0.0},
                                              {"is_causal", true},
                                              {"hidden_act", "silu"},
                                              {"attention_dropout", 0.0},
                                              {"id2label", {{"0", "LABEL_0"}}},
                                              {"torch_dtype", "bfloat16"}})))
        << family;
  }
}

/// What the two generations of transformers write for the same model, by `save_pretrained` of a
/// config with the sizes below (4.57.1 and 5.23.0); every other value is the family's default.
struct Generations {
  const char* family;
  const char* four;
  const char* five;
};

#define MESHLOOM_TEST_SIZES                                                                          \
  R"("hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,)" \
  R"( "num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.02, "use_cache": true,)"    \
  R"( "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": false, )"

const Generations kGenerations[] = {
    {"llama",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
        "max_position_embeddings": 2048, "mlp_bias": false, "model_type": "llama",
        "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0,
        "transformers_version": "4.57.1"})",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
        "max_position_embeddings": 2048, "mlp_bias": false, "model_type": "llama",
        "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "transformers_version": "5.23.0"})"},
    {"mistral",
     "{" MESHLOOM_TEST_SIZES
     R"("bos_token_id": 1, "eos_token_id": 2, "head_dim": null,
        "max_position_embeddings": 131072, "model_type": "mistral", "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.57.1"})",
     "{" MESHLOOM_TEST_SIZES
     R"("bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "max_position_embeddings": 131072,
        "model_type": "mistral", "pad_token_id": null, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 4096, "transformers_version": "5.23.0"})"},
    {"qwen2",
     "{" MESHLOOM_TEST_SIZES
     R"("layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": null,
        "transformers_version": "4.57.1", "use_sliding_window": false})",
     "{" MESHLOOM_TEST_SIZES
     R"("bos_token_id": null, "eos_token_id": null,
        "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "pad_token_id": null,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": null, "transformers_version": "5.23.0", "use_sliding_window": false})"},
    {"qwen3",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "head_dim": 128,
        "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen3", "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": null,
        "transformers_version": "4.57.1", "use_sliding_window": false})",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "bos_token_id": null, "eos_token_id": null, "head_dim": 128,
        "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen3", "pad_token_id": null,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": null, "transformers_version": "5.23.0", "use_sliding_window": false})"},
    {"mixtral",
     "{" MESHLOOM_TEST_SIZES
     R"("bos_token_id": 1, "eos_token_id": 2, "head_dim": null,
        "max_position_embeddings": 131072, "model_type": "mixtral", "num_experts_per_tok": 2,
        "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "sliding_window": null, "transformers_version": "4.57.1"})",
     "{" MESHLOOM_TEST_SIZES
     R"("bos_token_id": 1, "eos_token_id": 2, "head_dim": null,
        "max_position_embeddings": 131072, "model_type": "mixtral", "num_experts_per_tok": 2,
        "num_local_experts": 8, "output_router_logits": false, "pad_token_id": null,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "sliding_window": null,
        "transformers_version": "5.23.0"})"},
    {"qwen3_moe",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "decoder_sparse_step": 1, "max_position_embeddings": 32768,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": false, "num_experts": 128, "num_experts_per_tok": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "transformers_version": "4.57.1", "use_sliding_window": false})",
     "{" MESHLOOM_TEST_SIZES
     R"("attention_bias": false, "bos_token_id": null, "decoder_sparse_step": 1,
        "eos_token_id": null, "max_position_embeddings": 32768, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": false,
        "num_experts_per_tok": 8, "num_local_experts": 128, "output_router_logits": false,
        "pad_token_id": null, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001, "sliding_window": null,
        "transformers_version": "5.23.0", "use_sliding_window": false})"},
};
#undef MESHLOOM_TEST_SIZES

TEST(ModelConfig, BothGenerationsOfTransformersDescribeTheSameModel) {
  for (const Generations& g : kGenerations) {
    SCOPED_TRACE(g.family);
    const ModelConfig four = ModelConfig::from_json(g.four);
    const ModelConfig five = ModelConfig::from_json(g.five);
    EXPECT_EQ(four.to_json(), five.to_json());
    EXPECT_EQ(four.model_type, g.family);
    EXPECT_EQ(four.head_dim, four.model_type == "qwen3" ? 128 : 8);
    EXPECT_EQ(four.kv_heads, 2);
    EXPECT_EQ(four.rms_norm_eps, four.model_type == "mixtral" ? 1e-5 : 1e-6);
    EXPECT_EQ(four.rope.theta, four.model_type == "mixtral" ? 1e6 : 1e4);
    EXPECT_EQ(four.qkv_bias, four.model_type == "qwen2");
    EXPECT_FALSE(four.output_bias);
    EXPECT_EQ(four.qk_norm, four.model_type.starts_with("qwen3"));
    EXPECT_EQ(four.windows, std::vector<std::int64_t>(2, four.model_type == "mistral" ? 4096 : 0));
    const bool moe = four.model_type == "mixtral" || four.model_type == "qwen3_moe";
    EXPECT_EQ(four.moe_layers, std::vector<bool>(2, moe));
    EXPECT_EQ(four.moe.experts, four.model_type == "mixtral" ? 8 : moe ? 128 : 0);
    EXPECT_EQ(four.moe.experts_per_token, four.model_type == "mixtral" ? 2 : moe ? 8 : 0);
    EXPECT_EQ(four.moe.normalize_top_k, !moe || four.model_type == "mixtral");
  }
}

TEST(ModelConfig, RopeFormsReadTheSameFromBothGenerations) {
  const std::vector<Json> forms{
      {{"rope_type", "linear"}, {"factor", 3.0}},
      {{"rope_type", "llama3"},
       {"factor", 8.0},
       {"low_freq_factor", 1.0},
       {"high_freq_factor", 4.0},
       {"original_max_position_embeddings", 8192}},
      {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}},
      {{"rope_type", "yarn"},
       {"factor", 4.0},
       {"original_max_position_embeddings", 32768},
       {"beta_fast", 24.0},
       {"beta_slow", 2.0},
       {"mscale", 0.7},
       {"mscale_all_dim", 1.3},
       {"attention_factor", 0.9},
       {"truncate", false}},
  };
  for (const Json& form : forms) {
    SCOPED_TRACE(form.dump());
    const Json four{
        {"rope_theta", 5e5}, {"max_position_embeddings", 65536}, {"rope_scaling", form}};
    Json parameters = form;
    parameters["rope_theta"] = 5e5;
    const Json five{{"max_position_embeddings", 65536}, {"rope_parameters", parameters}};
    // Before "rope_type" the key was "type".
    Json old = form;
    old["type"] = old["rope_type"];
    old.erase("rope_type");
    const Json older{
        {"rope_theta", 5e5}, {"max_position_embeddings", 65536}, {"rope_scaling", old}};
    const ModelConfig config = parse(with("qwen2", four));
    EXPECT_EQ(config.rope.type, form["rope_type"]);
    EXPECT_EQ(config.rope.theta, 5e5);
    EXPECT_EQ(config.rope.factor, form["factor"].get<double>());
    EXPECT_EQ(parse(with("qwen2", five)).to_json(), config.to_json());
    EXPECT_EQ(parse(with("qwen2", older)).to_json(), config.to_json());
    EXPECT_EQ(ModelConfig::from_json(config.to_json()).to_json(), config.to_json());
  }
}

TEST(ModelConfig, WindowsFollowTheFamilysOwnRules) {
  using Windows = std::vector<std::int64_t>;
  EXPECT_EQ(parse(with("mistral", {})).windows, Windows(3, 4096));
  EXPECT_EQ(parse(with("mistral", {{"sliding_window", nullptr}})).windows, Windows(3, 0));
  EXPECT_EQ(parse(with("mixtral", {{"sliding_window", 9}})).windows, Windows(3, 9));
  // Qwen keeps sliding_window in the file while use_sliding_window switches it off.
  EXPECT_EQ(parse(with("qwen2", {{"sliding_window", 9}})).windows, Windows(3, 0));
  const Json on{{"sliding_window", 9}, {"use_sliding_window", true}};
  Json late = on;
  late["max_window_layers"] = 2;
  EXPECT_EQ(parse(with("qwen2", late)).windows, (Windows{0, 0, 9}));
  EXPECT_EQ(parse(with("qwen3_moe", on)).windows, Windows(3, 9));
  Json listed = on;
  listed["layer_types"] = {"sliding_attention", "full_attention", "sliding_attention"};
  EXPECT_EQ(parse(with("qwen3", listed)).windows, (Windows{9, 0, 9}));
}

TEST(ModelConfig, MoeLayersFollowStepAndExceptions) {
  const auto layers = [](const Json& more) { return parse(with("qwen3_moe", more)).moe_layers; };
  EXPECT_EQ(layers({}), (std::vector<bool>{true, true, true}));
  EXPECT_EQ(layers({{"decoder_sparse_step", 2}}), (std::vector<bool>{false, true, false}));
  EXPECT_EQ(layers({{"mlp_only_layers", {0, 2}}}), (std::vector<bool>{false, true, false}));
}

TEST(ModelConfig, WrittenConfigReadsBackTheSame) {
  const std::vector<std::pair<const char*, Json>> cases{
      {"llama", {{"attention_bias", true}, {"mlp_bias", true}, {"tie_word_embeddings", true}}},
      {"llama", {{"eos_token_id", {5, 6, 7}}, {"bos_token_id", 3}, {"torch_dtype", "bfloat16"}}},
      {"mistral", {{"sliding_window", 7}}},
      {"mistral", {{"sliding_window", nullptr}, {"head_dim", 16}}},
      {"qwen2", {{"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 1}}},
      {"qwen3",
       {{"use_sliding_window", true},
        {"sliding_window", 5},
        {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}}},
      {"mixtral", {{"router_aux_loss_coef", 0.02}, {"output_router_logits", true}}},
      {"qwen3_moe", {{"norm_topk_prob", true}, {"mlp_only_layers", {1}}, {"rms_norm_eps", 1e-5}}},
      {"deepseek_v3", {{"q_lora_rank", nullptr}, {"rope_interleave", false}}},
      {"deepseek_v3",
       {{"first_k_dense_replace", 0}, {"aux_loss_alpha", 1e-4}, {"norm_topk_prob", false}}},
  };
  for (const auto& [family, more] : cases) {
    const ModelConfig config = parse(with(family, more));
    const ModelConfig again = ModelConfig::from_json(config.to_json());
    EXPECT_EQ(again.to_json(), config.to_json());
    EXPECT_EQ(again.windows, config.windows);
    EXPECT_EQ(again.moe_layers, config.moe_layers);
    EXPECT_EQ(again.rms_norm_eps, config.rms_norm_eps);
    EXPECT_EQ(again.moe.normalize_top_k, config.moe.normalize_top_k);
    EXPECT_EQ(again.more_eos_token_ids, config.more_eos_token_ids);
    EXPECT_EQ(again.parameter_count(), config.parameter_count());
  }
}

TEST(ModelConfig, WhatAFamilyCannotExpressIsNotWritten) {
  const auto refused = [](const char* family, auto change, const char* expected) {
    ModelConfig config = parse(minimal(family));
    change(config);
    const std::string message = message_of<NotSupported>([&] { (void)config.to_json(); });
    EXPECT_NE(message.find(expected), std::string::npos) << family << ": " << message;
  };
  refused(
      "mixtral", [](auto& c) { c.qkv_bias = true; }, "these attention biases");
  refused(
      "qwen2", [](auto& c) { c.qkv_bias = false; }, "these attention biases");
  refused(
      "mistral", [](auto& c) { c.mlp_bias = true; }, "mlp_bias");
  refused(
      "llama", [](auto& c) { c.qk_norm = true; }, "this qk_norm");
  refused(
      "llama", [](auto& c) { c.windows[0] = 4; }, "these windows");
  refused(
      "qwen3",
      [](auto& c) {
        c.windows = {4, 0, 5};
      },
      "these windows");
  refused(
      "mixtral", [](auto& c) { c.moe_layers[1] = false; }, "dense layers");
  refused(
      "qwen3_moe", [](auto& c) { c.moe.score = RouterScore::kSigmoid; }, "sigmoid");
  refused(
      "qwen3_moe", [](auto& c) { c.moe.shared_experts = 1; }, "these expert settings");
  refused(
      "llama", [](auto& c) { c.latent.kv_lora_rank = 8; }, "this attention");
  refused(
      "deepseek_v3", [](auto& c) { c.moe.correction_bias = false; }, "this router");
  refused(
      "deepseek_v3",
      [](auto& c) {
        c.moe_layers = {true, false, true};
      },
      "a dense layer 1 after");
}

}  // namespace
}  // namespace meshloom::model
