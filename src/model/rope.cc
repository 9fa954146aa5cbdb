#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "meshloom/core/error.h"
#include "model/internal/layers.h"

namespace meshloom::model::detail {
namespace {

constexpr double kTwoPi = 2.0 * std::numbers::pi;

/// Wavelengths longer than the original context are stretched, short ones kept, those between
/// blended.
at::Tensor llama3_frequencies(const at::Tensor& inverse, const RopeConfig& rope) {
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  const double longest = context / rope.low_freq_factor;
  const double shortest = context / rope.high_freq_factor;
  const at::Tensor wavelength = inverse.reciprocal() * kTwoPi;
  const at::Tensor scaled = at::where(wavelength > longest, inverse / rope.factor, inverse);
  const at::Tensor smooth = (wavelength.reciprocal() * context - rope.low_freq_factor) /
                            (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor blended = (1.0 - smooth) * scaled / rope.factor + smooth * scaled;
  const at::Tensor between = (wavelength >= shortest).logical_and(wavelength <= longest);
  return at::where(between, blended, scaled);
}

at::Tensor yarn_frequencies(const at::Tensor& inverse, const RopeConfig& rope, std::int64_t dim) {
  const auto rotations_at = [&](double rotations) {
    return static_cast<double>(dim) *
           std::log(static_cast<double>(rope.original_max_position_embeddings) /
                    (rotations * kTwoPi)) /
           (2.0 * std::log(rope.theta));
  };
  double low = rotations_at(rope.beta_fast);
  double high = rotations_at(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;  // as transformers: no division by zero
  const at::Tensor ramp =
      at::clamp((at::arange(dim / 2, inverse.options()) - low) / (high - low), 0, 1);
  const at::Tensor keep = 1.0 - ramp;
  return inverse / rope.factor * (1.0 - keep) + inverse * keep;
}

double yarn_mscale(const RopeConfig& rope, double weight) {
  return rope.factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(rope.factor) + 1.0;
}

double yarn_scaling(const RopeConfig& rope) {
  if (rope.attention_factor != 0.0) return rope.attention_factor;
  if (rope.mscale != 0.0 && rope.mscale_all_dim != 0.0) {
    return yarn_mscale(rope, rope.mscale) / yarn_mscale(rope, rope.mscale_all_dim);
  }
  return yarn_mscale(rope, 1.0);
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelConfig& config, at::ScalarType dtype) {
  const std::int64_t dim = config.rope_dim();
  const RopeConfig& rope = config.rope;
  const at::Tensor exponents =
      at::arange(0, dim, 2, at::TensorOptions().dtype(dtype)) / static_cast<double>(dim);
  const at::Tensor inverse = at::pow(rope.theta, exponents).reciprocal();
  if (rope.type == "default") return {inverse, 1.0};
  if (rope.type == "linear") return {inverse / rope.factor, 1.0};
  if (rope.type == "llama3") return {llama3_frequencies(inverse, rope), 1.0};
  if (rope.type == "yarn") return {yarn_frequencies(inverse, rope, dim), yarn_scaling(rope)};
  throw NotSupported("model.rope", "rope_type \"" + rope.type + "\" is not built");
}

double attention_scale(const ModelConfig& config) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  if (config.latent.kv_lora_rank == 0 || config.rope.mscale_all_dim == 0.0) return scale;
  const double mscale = yarn_mscale(config.rope, config.rope.mscale_all_dim);
  return scale * mscale * mscale;
}

}  // namespace meshloom::model::detail
