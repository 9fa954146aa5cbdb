#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

/// Rotary embedding, in the forms of Hugging Face's `rope_type`.
struct RopeConfig {
  std::string type = "default";  ///< default, linear, llama3, yarn
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;                       ///< llama3
  double high_freq_factor = 4.0;                      ///< llama3
  std::int64_t original_max_position_embeddings = 0;  ///< llama3, yarn
  double beta_fast = 32.0;                            ///< yarn
  double beta_slow = 1.0;                             ///< yarn
  double attention_factor = 0.0;                      ///< yarn; 0: derived
  double mscale = 0.0;                                ///< yarn
  double mscale_all_dim = 0.0;                        ///< yarn
  bool truncate = true;                               ///< yarn
};

enum class RouterScore : std::uint8_t { kSoftmax, kSigmoid };

/// Multi-head latent attention (DeepSeek-V2); `kv_lora_rank == 0` means there is none. Keys and
/// values of all heads come from one latent of kv_lora_rank numbers a token; a head's key is its
/// own part without positions, then a rotated part that all heads share.
struct LatentAttentionConfig {
  std::int64_t q_lora_rank = 0;  ///< 0: queries are projected from the stream itself
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  bool interleaved_rope = true;  ///< neighbours rotate together, not halves
};

/// Mixture-of-experts part; `experts == 0` means a dense model.
struct MoeConfig {
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
  std::int64_t intermediate_size = 0;  ///< of one expert
  bool normalize_top_k = true;         ///< weights of the chosen experts sum to `weight_scale`
  RouterScore score = RouterScore::kSoftmax;
  double weight_scale = 1.0;        ///< of the chosen experts' weights
  std::int64_t groups = 1;          ///< of neighbouring experts
  std::int64_t top_groups = 1;      ///< a token chooses among the experts of so many groups
  bool correction_bias = false;     ///< a bias per expert is added to the scores for the choice
  std::int64_t shared_experts = 0;  ///< that every token meets: one MLP of that many times the size
  double aux_loss_coefficient = 0.0;
  bool output_router_logits = false;  ///< carried along: transformers then adds the balance loss
};

/// A decoder language model, as its Hugging Face `config.json` describes it.
struct MESHLOOM_API ModelConfig {
  std::string model_type;  ///< llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, deepseek_v3
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;  ///< of queries and keys, the rotated part included
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  ///< of the attention output projection
  bool mlp_bias = false;
  bool qk_norm = false;
  std::vector<std::int64_t> windows;  ///< [layers], tokens a query sees, itself included; 0: all
  std::vector<bool> moe_layers;       ///< [layers]
  RopeConfig rope;
  LatentAttentionConfig latent;
  MoeConfig moe;
  /// Further layers of a checkpoint, for multi-token prediction. They are not part of the model, as
  /// in transformers: their tensors are passed over and not saved.
  std::int64_t prediction_layers = 0;
  std::int64_t max_position_embeddings = 0;  ///< carried along; positions are not limited by it
  std::int64_t bos_token_id = -1;            ///< -1: none
  std::int64_t pad_token_id = -1;
  std::int64_t eos_token_id = -1;  ///< the first, where there are several
  std::vector<std::int64_t> more_eos_token_ids;
  std::string dtype = "float32";  ///< of the stored weights, as config.json names it

  /// Reads config.json as transformers 4 or 5 writes it.
  /// @throws IoError       the file cannot be read.
  /// @throws DataError     not JSON, or a field is missing or of the wrong type; names it.
  /// @throws NotSupported  a model_type, activation or feature that is not built; names it.
  [[nodiscard]] static ModelConfig load(const std::string& path);
  [[nodiscard]] static ModelConfig from_json(const std::string& text);
  /// A config.json that transformers opens (4 and 5: the keys are those both know).
  /// @throws NotSupported  the family cannot express these fields (e.g. biases in a Mixtral).
  [[nodiscard]] std::string to_json() const;

  /// @throws DataError  sizes that contradict each other (heads not a multiple of kv_heads, ...).
  void validate() const;

  [[nodiscard]] std::int64_t parameter_count() const;
  /// Numbers of a head that rotate, and of a value head.
  [[nodiscard]] std::int64_t rope_dim() const;
  [[nodiscard]] std::int64_t value_dim() const;
};

}  // namespace meshloom::model
