#pragma once

#include <cstdint>

#include "meshloom/core/export.h"

namespace meshloom {

/// Sizes of a decoder model, as far as memory depends on them.
struct ModelSizes {
  int layers = 1;
  std::int64_t hidden = 1;
  std::int64_t heads = 1;
  std::int64_t key_value_heads = 1;
  std::int64_t head_dim = 1;
  std::int64_t intermediate = 1;  ///< of a dense feed-forward layer, or of one expert
  std::int64_t experts = 0;       ///< 0: dense
  std::int64_t experts_per_token = 0;
  std::int64_t vocabulary = 1;
  bool tied_embeddings = false;
  int element_bytes = 2;  ///< of activations and parameters
};

/// What backward needs of one token in one layer, in bytes, by kind of layer.
struct LayerBytes {
  double norms = 0.0;         ///< both inputs and their scales
  double attention = 0.0;     ///< input, queries, keys, values, output, log-sum-exp
  double feed_forward = 0.0;  ///< input, gate, up and their product; router and chosen experts
  [[nodiscard]] double total() const { return norms + attention + feed_forward; }
};

/// @throws InvalidArgument  a size is below 1, or experts_per_token outside 1 .. experts.
[[nodiscard]] MESHLOOM_API LayerBytes saved_bytes_per_token(const ModelSizes& model);

[[nodiscard]] MESHLOOM_API std::int64_t parameter_count(const ModelSizes& model);

/// How states are spread over ranks.
struct StateSharding {
  int tp = 1;
  int pp = 1;
  int replicas = 1;               ///< ranks that share one optimizer state (ZeRO-1)
  double optimizer_bytes = 12.0;  ///< of one parameter: fp32 master and two moments
  double gradient_bytes = 4.0;    ///< of one parameter
};

/// Parameters, gradients and optimizer state of one rank, in bytes.
[[nodiscard]] MESHLOOM_API double state_bytes(const ModelSizes& model,
                                              const StateSharding& sharding);

/// Tokens of one unit that a rank's device holds beside its states: what plans call capacity. With
/// a pipeline every stage holds up to `pp` micro-batches of its layers, which is the whole model's
/// activations of one.
/// @param reserved_bytes  for what this does not count: workspaces, buffers, fragmentation.
/// @throws InvalidArgument  nothing is left; gives the figures.
[[nodiscard]] MESHLOOM_API std::int64_t capacity_tokens(double device_bytes, double reserved_bytes,
                                                        const ModelSizes& model,
                                                        const StateSharding& sharding);

}  // namespace meshloom
