#include "meshloom/cost/model_sizes.h"

#include <fmt/format.h>

#include <utility>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

constexpr const char* kWhere = "cost.model_sizes";

/// What rank r of n holds of `size`.
std::int64_t part(std::int64_t size, int rank, int ranks) {
  return size * (rank + 1) / ranks - size * rank / ranks;
}

}  // namespace

void ModelSizes::validate() const {
  const std::pair<const char*, std::int64_t> sizes[] = {
      {"layers", layers()},       {"hidden", hidden},
      {"heads", heads},           {"key_value_heads", key_value_heads},
      {"head_dim", head_dim},     {"intermediate", intermediate},
      {"vocabulary", vocabulary}, {"expert_intermediate", experts > 0 ? expert_intermediate : 1}};
  for (const auto& [name, size] : sizes) {
    MESHLOOM_CHECK(size >= 1, kWhere, fmt::format("{} is {}, expected at least 1", name, size));
  }
  const bool experts_fit =
      experts == 0 || (experts > 0 && experts_per_token >= 1 && experts_per_token <= experts);
  MESHLOOM_CHECK(
      experts_fit, kWhere,
      fmt::format("experts_per_token is {}, expected 1 .. {}", experts_per_token, experts));
}

LayerParameters layer_parameters(const ModelSizes& model, std::int64_t layer, int rank, int ranks) {
  const std::int64_t hidden = model.hidden;
  LayerParameters result;
  result.replicated = 2 * hidden;  // norms
  if (model.kv_lora_rank > 0) {
    const std::int64_t nope = model.head_dim - model.rotated();
    const std::int64_t latents = model.q_lora_rank + model.kv_lora_rank + model.rotated();
    const std::int64_t query_input = model.q_lora_rank > 0 ? model.q_lora_rank : hidden;
    result.replicated += latents * (hidden + (model.qkv_bias ? 1 : 0)) + model.q_lora_rank +
                         model.kv_lora_rank + (model.output_bias ? hidden : 0);
    result.split += part(model.heads, rank, ranks) *
                    (model.head_dim * query_input + (nope + model.values()) * model.kv_lora_rank +
                     model.values() * hidden);
  } else {
    const std::int64_t queries = part(model.heads, rank, ranks) * model.head_dim;
    const bool shared = model.key_value_heads < ranks;
    const std::int64_t keys =
        (shared ? 1 : part(model.key_value_heads, rank, ranks)) * model.head_dim;
    const std::int64_t inputs = hidden + (model.qkv_bias ? 1 : 0);
    result.split += queries * (inputs + hidden);
    (shared ? result.key_value : result.split) += 2 * keys * inputs;
    result.replicated +=
        (model.output_bias ? hidden : 0) + (model.qk_norm ? 2 * model.head_dim : 0);
  }
  const auto dense = [&](std::int64_t inner, bool biased) {
    result.split += part(inner, rank, ranks) * (3 * hidden + (biased ? 2 : 0));
    result.replicated += biased ? hidden : 0;
  };
  if (!model.moe_layers.at(static_cast<std::size_t>(layer))) {
    dense(model.intermediate, model.mlp_bias);
    return result;
  }
  result.replicated += model.experts * (hidden + (model.correction_bias ? 1 : 0));
  if (model.shared_intermediate > 0) dense(model.shared_intermediate, false);
  result.expert = 3 * hidden * model.expert_intermediate;
  return result;
}

std::int64_t parameter_count(const ModelSizes& model) {
  model.validate();
  std::int64_t count =
      model.vocabulary * model.hidden * (model.tied_embeddings ? 1 : 2) + model.hidden;
  for (std::int64_t layer = 0; layer < model.layers(); ++layer) {
    const LayerParameters own = layer_parameters(model, layer, 0, 1);
    count += own.split + own.key_value + own.replicated + model.experts * own.expert;
  }
  return count;
}

}  // namespace meshloom
