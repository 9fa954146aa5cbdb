#pragma once

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom {

/// Sizes of a decoder model, as far as memory and traffic depend on them.
struct MESHLOOM_API ModelSizes {
  std::int64_t hidden = 1;
  std::int64_t heads = 1;
  std::int64_t key_value_heads = 1;
  std::int64_t head_dim = 1;   ///< of queries and keys
  std::int64_t value_dim = 0;  ///< 0: head_dim
  std::int64_t rope_dim = 0;   ///< numbers of a head that rotate; 0: head_dim
  std::int64_t intermediate = 1;
  std::int64_t vocabulary = 1;
  std::vector<bool> moe_layers;  ///< [layers]: whether it is a mixture of experts
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
  std::int64_t expert_intermediate = 0;
  std::int64_t shared_intermediate = 0;  ///< of what every token meets in such a layer
  std::int64_t q_lora_rank = 0;          ///< latent attention; 0: queries have no latent
  std::int64_t kv_lora_rank = 0;         ///< 0: no latent attention
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  bool correction_bias = false;

  [[nodiscard]] std::int64_t layers() const { return std::ssize(moe_layers); }
  [[nodiscard]] std::int64_t values() const { return value_dim > 0 ? value_dim : head_dim; }
  [[nodiscard]] std::int64_t rotated() const { return rope_dim > 0 ? rope_dim : head_dim; }

  /// @throws InvalidArgument  a size is below 1, or experts_per_token outside 1 .. experts.
  void validate() const;

  friend bool operator==(const ModelSizes&, const ModelSizes&) = default;
};

/// Who holds the parameters of one layer, by what splits them over ranks.
struct LayerParameters {
  std::int64_t split = 0;       ///< of one tensor rank: what tensor parallelism cuts
  std::int64_t key_value = 0;   ///< of one tensor rank: K/V projections that neighbours share
  std::int64_t replicated = 0;  ///< whole on every tensor rank: norms, routers, latents
  std::int64_t expert = 0;      ///< of one routed expert
};

/// Parameters of a decoder layer on tensor rank `rank` of `ranks`. @pre the ranks serve the heads.
[[nodiscard]] MESHLOOM_API LayerParameters layer_parameters(const ModelSizes& model,
                                                            std::int64_t layer, int rank,
                                                            int ranks);

/// Of the whole model, tied embeddings once.
[[nodiscard]] MESHLOOM_API std::int64_t parameter_count(const ModelSizes& model);

}  // namespace meshloom
