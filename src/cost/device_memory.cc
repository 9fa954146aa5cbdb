#include "meshloom/cost/device_memory.h"

#include <fmt/format.h>

#include <utility>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

/// Scales of norms and log-sum-exps are kept in fp32, router probabilities too.
constexpr double kStatisticBytes = 4.0;

void check(const ModelSizes& model) {
  const std::pair<const char*, std::int64_t> sizes[] = {
      {"layers", model.layers},         {"hidden", model.hidden},
      {"heads", model.heads},           {"key_value_heads", model.key_value_heads},
      {"head_dim", model.head_dim},     {"intermediate", model.intermediate},
      {"vocabulary", model.vocabulary}, {"element_bytes", model.element_bytes}};
  for (const auto& [name, size] : sizes) {
    MESHLOOM_CHECK(size >= 1, "cost.device_memory",
                   fmt::format("{} is {}, expected at least 1", name, size));
  }
  const bool experts_fit =
      model.experts == 0 || (model.experts > 0 && model.experts_per_token >= 1 &&
                             model.experts_per_token <= model.experts);
  MESHLOOM_CHECK(experts_fit, "cost.device_memory",
                 fmt::format("experts_per_token is {}, expected 1 .. {}", model.experts_per_token,
                             model.experts));
}

}  // namespace

LayerBytes saved_bytes_per_token(const ModelSizes& model) {
  check(model);
  const auto hidden = static_cast<double>(model.hidden);
  const auto intermediate = static_cast<double>(model.intermediate);
  const auto heads = static_cast<double>(model.heads);
  const double element = model.element_bytes;
  const double queries = heads * static_cast<double>(model.head_dim);
  const double keys = static_cast<double>(model.key_value_heads * model.head_dim);
  LayerBytes bytes;
  bytes.norms = 2.0 * (hidden * element + kStatisticBytes);
  bytes.attention = (hidden + 2.0 * queries + 2.0 * keys) * element + heads * kStatisticBytes;
  const double expert = (hidden + 3.0 * intermediate) * element;
  bytes.feed_forward = model.experts == 0
                           ? expert
                           : static_cast<double>(model.experts_per_token) * expert +
                                 hidden * element +
                                 static_cast<double>(model.experts) * kStatisticBytes;
  return bytes;
}

std::int64_t parameter_count(const ModelSizes& model) {
  check(model);
  const std::int64_t queries = model.heads * model.head_dim;
  const std::int64_t keys = model.key_value_heads * model.head_dim;
  const std::int64_t attention = model.hidden * (2 * queries + 2 * keys);
  const std::int64_t expert = 3 * model.hidden * model.intermediate;
  const std::int64_t feed_forward =
      model.experts == 0 ? expert : model.experts * expert + model.experts * model.hidden;
  const std::int64_t embeddings = model.vocabulary * model.hidden * (model.tied_embeddings ? 1 : 2);
  return model.layers * (attention + feed_forward + 2 * model.hidden) + embeddings + model.hidden;
}

double state_bytes(const ModelSizes& model, const StateSharding& sharding) {
  MESHLOOM_CHECK(sharding.tp >= 1 && sharding.pp >= 1 && sharding.replicas >= 1,
                 "cost.device_memory",
                 fmt::format("tp {}, pp {}, replicas {}, expected at least 1", sharding.tp,
                             sharding.pp, sharding.replicas));
  const double mine = static_cast<double>(parameter_count(model)) / (sharding.tp * sharding.pp);
  return mine * (model.element_bytes + sharding.gradient_bytes +
                 sharding.optimizer_bytes / sharding.replicas);
}

std::int64_t capacity_tokens(double device_bytes, double reserved_bytes, const ModelSizes& model,
                             const StateSharding& sharding) {
  const double states = state_bytes(model, sharding);
  const double left = device_bytes - reserved_bytes - states;
  const double token = saved_bytes_per_token(model).total() * model.layers / sharding.tp;
  if (!(left >= token)) {
    throw InvalidArgument("cost.device_memory",
                          fmt::format("{:.3g} bytes of a device less {:.3g} reserved and {:.3g} of "
                                      "states leave no room for a token of {:.3g}",
                                      device_bytes, reserved_bytes, states, token));
  }
  return static_cast<std::int64_t>(left / token);
}

}  // namespace meshloom
