#include <gtest/gtest.h>

#include <vector>

#include "meshloom/model/config.h"

namespace meshloom::model {
namespace {

/// As the Hub's DeepSeek-V3 has it, but for its fp8 weights and its sizes.
TEST(ModelConfig, DeepseekV3OfTheHubIsUnderstood) {
  const ModelConfig config = ModelConfig::from_json(R"({
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "n_shared_experts": 1, "norm_topk_prob": true,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
      "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
    "topk_method": "noaux_tc", "v_head_dim": 128})");
  EXPECT_EQ(config.head_dim, 192);
  EXPECT_EQ(config.rope_dim(), 64);
  EXPECT_EQ(config.value_dim(), 128);
  EXPECT_EQ(config.latent.q_lora_rank, 1536);
  EXPECT_TRUE(config.latent.interleaved_rope);
  EXPECT_EQ(config.moe_layers, (std::vector<bool>{false, true, true}));
  EXPECT_EQ(config.moe.score, RouterScore::kSigmoid);
  EXPECT_TRUE(config.moe.correction_bias && config.moe.normalize_top_k);
  EXPECT_EQ(config.moe.weight_scale, 2.5);
  EXPECT_EQ(config.moe.groups, 4);
  EXPECT_EQ(config.moe.aux_loss_coefficient, 0.001);
  EXPECT_EQ(config.prediction_layers, 1);
  EXPECT_EQ(ModelConfig::from_json(config.to_json()).prediction_layers, 0);
}

}  // namespace
}  // namespace meshloom::model
