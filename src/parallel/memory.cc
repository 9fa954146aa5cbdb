#include "meshloom/parallel/memory.h"

namespace meshloom::parallel {

ModelSizes model_sizes(const model::ModelConfig& config) {
  const model::LatentAttentionConfig& latent = config.latent;
  return {.hidden = config.hidden_size,
          .heads = config.heads,
          .key_value_heads = config.kv_heads,
          .head_dim = config.head_dim,
          .value_dim = config.value_dim(),
          .rope_dim = config.rope_dim(),
          .intermediate = config.intermediate_size,
          .vocabulary = config.vocab_size,
          .moe_layers = config.moe_layers,
          .experts = config.moe.experts,
          .experts_per_token = config.moe.experts_per_token,
          .expert_intermediate = config.moe.intermediate_size,
          .shared_intermediate = config.moe.shared_experts * config.moe.intermediate_size,
          .q_lora_rank = latent.q_lora_rank,
          .kv_lora_rank = latent.kv_lora_rank,
          .tied_embeddings = config.tie_word_embeddings,
          .qkv_bias = config.qkv_bias,
          .output_bias = config.output_bias,
          .mlp_bias = config.mlp_bias,
          .qk_norm = config.qk_norm,
          .correction_bias = config.moe.correction_bias};
}

plan::MemorySetting memory_setting(const ModelPlacement& placement, const std::string& schedule,
                                   const std::string& recompute, std::int64_t element_bytes) {
  return {.model = model_sizes(placement.config),
          .layout = placement.layout,
          .zero = static_cast<int>(placement.zero),
          .schedule = schedule,
          .split = placement.split,
          .recompute = recompute,
          .element_bytes = element_bytes,
          .bucket_elements = placement.bucket_elements};
}

}  // namespace meshloom::parallel
