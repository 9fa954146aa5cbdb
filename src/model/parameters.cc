#include "meshloom/model/parameters.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

#include "meshloom/core/check.h"
#include "meshloom/core/random.h"

namespace meshloom::model {
namespace {

/// Which part of a tensor a rank holds: [begin, end) of one dimension.
struct Cut {
  std::size_t dim = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  int copies = 1;
};

/// Appends a model's parameters in flat order.
class TableBuilder {
 public:
  TableBuilder(const ModelConfig& config, TensorShard shard) : config_(config), shard_(shard) {}

  void embedding() {
    layer_ = -1;
    vocabulary("model.embed_tokens", false);
  }
  void head(bool tied) {
    layer_ = config_.layers;
    norm("model.norm", config_.hidden_size);
    if (!tied) vocabulary("lm_head", true);
  }
  void layer(std::int64_t index) {
    layer_ = index;
    const std::string prefix = fmt::format("model.layers.{}.", index);
    norm(prefix + "input_layernorm", config_.hidden_size);
    if (config_.latent.kv_lora_rank > 0) {
      latent_attention(prefix + "self_attn.");
    } else {
      attention(prefix + "self_attn.");
    }
    norm(prefix + "post_attention_layernorm", config_.hidden_size);
    if (config_.moe_layers.at(std::size_t(index))) {
      experts(prefix);
    } else {
      dense(prefix + "mlp.", config_.intermediate_size, config_.mlp_bias);
    }
  }

  ParameterTable take() { return std::move(table_); }

 private:
  void norm(const std::string& name, std::int64_t size) {
    add({.name = name + ".weight", .shape = {size}, .decay = false, .ones = true});
  }
  void add(ParameterSpec spec, const std::optional<Cut>& cut = std::nullopt) {
    spec.layer = layer_;
    if (shard_.ranks > 1) {
      spec.copies = shard_.ranks;
      if (cut) {
        spec.copies = cut->copies;
        spec.whole = spec.shape;
        spec.corner.assign(spec.shape.size(), 0);
        spec.corner[cut->dim] = cut->begin;
        spec.shape[cut->dim] = cut->end - cut->begin;
      }
    }
    table_.append(std::move(spec));
  }
  void weight(const std::string& name, std::vector<std::int64_t> shape,
              const std::optional<Cut>& cut = std::nullopt) {
    add({.name = name + ".weight", .shape = std::move(shape)}, cut);
  }
  void bias(const std::string& name, std::int64_t size,
            const std::optional<Cut>& cut = std::nullopt) {
    add({.name = name + ".bias", .shape = {size}, .decay = false, .zeros = true}, cut);
  }

  [[nodiscard]] Cut even(std::size_t dim, std::int64_t size, std::int64_t unit = 1) const {
    const auto [begin, end] = shard_range(size, shard_);
    return {.dim = dim, .begin = begin * unit, .end = end * unit};
  }

  void vocabulary(const std::string& name, bool decay) {
    add({.name = name + ".weight",
         .shape = {config_.vocab_size, config_.hidden_size},
         .decay = decay},
        even(0, config_.vocab_size));
  }

  void attention(const std::string& prefix) {
    const std::int64_t dim = config_.head_dim;
    const std::int64_t q = config_.heads * dim;
    const std::int64_t kv = config_.kv_heads * dim;
    const Cut of_q = even(0, config_.heads, dim);
    Cut of_kv = even(0, config_.kv_heads, dim);
    if (config_.kv_heads < shard_.ranks) {
      of_kv.copies = shard_.ranks / static_cast<int>(config_.kv_heads);
      of_kv.begin = shard_.rank / of_kv.copies * dim;
      of_kv.end = of_kv.begin + dim;
    }
    weight(prefix + "q_proj", {q, config_.hidden_size}, of_q);
    weight(prefix + "k_proj", {kv, config_.hidden_size}, of_kv);
    weight(prefix + "v_proj", {kv, config_.hidden_size}, of_kv);
    if (config_.qkv_bias) {
      bias(prefix + "q_proj", q, of_q);
      bias(prefix + "k_proj", kv, of_kv);
      bias(prefix + "v_proj", kv, of_kv);
    }
    if (config_.qk_norm) {
      norm(prefix + "q_norm", dim);
      norm(prefix + "k_norm", dim);
    }
    weight(prefix + "o_proj", {config_.hidden_size, q}, even(1, config_.heads, dim));
    if (config_.output_bias) bias(prefix + "o_proj", config_.hidden_size);
  }

  void latent_attention(const std::string& prefix) {
    const LatentAttentionConfig& latent = config_.latent;
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t kv = latent.kv_lora_rank + latent.qk_rope_head_dim;
    const bool q_latent = latent.q_lora_rank > 0;
    if (q_latent) weight(prefix + "q_a_proj", {latent.q_lora_rank, hidden});
    weight(prefix + "kv_a_proj_with_mqa", {kv, hidden});
    if (config_.qkv_bias) {
      if (q_latent) bias(prefix + "q_a_proj", latent.q_lora_rank);
      bias(prefix + "kv_a_proj_with_mqa", kv);
    }
    if (q_latent) norm(prefix + "q_a_layernorm", latent.q_lora_rank);
    norm(prefix + "kv_a_layernorm", latent.kv_lora_rank);
    const std::int64_t key_value = latent.qk_nope_head_dim + latent.v_head_dim;
    weight(prefix + (q_latent ? "q_b_proj" : "q_proj"),
           {config_.heads * config_.head_dim, q_latent ? latent.q_lora_rank : hidden},
           even(0, config_.heads, config_.head_dim));
    weight(prefix + "kv_b_proj", {config_.heads * key_value, latent.kv_lora_rank},
           even(0, config_.heads, key_value));
    weight(prefix + "o_proj", {hidden, config_.heads * latent.v_head_dim},
           even(1, config_.heads, latent.v_head_dim));
    if (config_.output_bias) bias(prefix + "o_proj", hidden);
  }

  void dense(const std::string& prefix, std::int64_t inner, bool biased) {
    const std::int64_t hidden = config_.hidden_size;
    const Cut features = even(0, inner);
    weight(prefix + "gate_proj", {inner, hidden}, features);
    weight(prefix + "up_proj", {inner, hidden}, features);
    if (biased) {
      bias(prefix + "gate_proj", inner, features);
      bias(prefix + "up_proj", inner, features);
    }
    weight(prefix + "down_proj", {hidden, inner}, even(1, inner));
    if (biased) bias(prefix + "down_proj", hidden);
  }

  void experts(const std::string& layer) {
    const bool mixtral = config_.model_type == "mixtral";
    const std::string prefix = layer + (mixtral ? "block_sparse_moe." : "mlp.");
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.moe.intermediate_size;
    const auto expert = [&](std::int64_t e, const char* name, std::vector<std::int64_t> shape) {
      add({.name = fmt::format("{}experts.{}.{}.weight", prefix, e, name),
           .shape = std::move(shape),
           .expert = e});
    };
    weight(prefix + "gate", {config_.moe.experts, hidden});
    if (config_.moe.correction_bias) {
      add({.name = prefix + "gate.e_score_correction_bias",
           .shape = {config_.moe.experts},
           .decay = false,
           .zeros = true,
           .counts_choices = true});
    }
    if (config_.moe.shared_experts > 0) {
      dense(prefix + "shared_experts.", config_.moe.shared_experts * inner, false);
    }
    for (std::int64_t e = 0; e < config_.moe.experts; ++e) {
      expert(e, mixtral ? "w1" : "gate_proj", {inner, hidden});
      expert(e, mixtral ? "w3" : "up_proj", {inner, hidden});
    }
    for (std::int64_t e = 0; e < config_.moe.experts; ++e) {
      expert(e, mixtral ? "w2" : "down_proj", {hidden, inner});
    }
  }

  const ModelConfig& config_;
  TensorShard shard_;
  std::int64_t layer_ = -1;
  ParameterTable table_;
};

/// Where an element of the held box lies in the checkpoint's tensor, row-major.
std::uint64_t whole_index(const ParameterSpec& spec, std::int64_t element) {
  if (spec.whole.empty()) return static_cast<std::uint64_t>(element);
  std::int64_t index = 0;
  std::int64_t stride = 1;
  for (std::size_t d = spec.shape.size(); d-- > 0;) {
    index += (spec.corner[d] + element % spec.shape[d]) * stride;
    element /= spec.shape[d];
    stride *= spec.whole[d];
  }
  return static_cast<std::uint64_t>(index);
}

/// Tensor-parallel sizes of up to `limit` that serve the heads.
std::vector<int> serving_ranks(const ModelConfig& config, int limit) {
  std::vector<int> result;
  for (int ranks = 1; ranks <= limit; ++ranks) {
    if (config.heads % ranks == 0 &&
        (config.kv_heads % ranks == 0 || ranks % config.kv_heads == 0)) {
      result.push_back(ranks);
    }
  }
  return result;
}

void check_shard(const ModelConfig& config, TensorShard shard) {
  constexpr const char* kWhere = "model.tensor_shard";
  MESHLOOM_CHECK(0 <= shard.rank && shard.rank < shard.ranks, kWhere,
                 fmt::format("rank {} of {}", shard.rank, shard.ranks));
  const std::vector<int> serving =
      serving_ranks(config, static_cast<int>(std::min<std::int64_t>(config.heads, 1024)));
  if (std::find(serving.begin(), serving.end(), shard.ranks) != serving.end()) return;
  throw InvalidArgument(
      kWhere,
      fmt::format("tp = {} does not fit {} query heads and {} key/value heads; these do: {}",
                  shard.ranks, config.heads, config.kv_heads, fmt::join(serving, ", ")));
}

}  // namespace

std::int64_t ParameterSpec::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

const ParameterSpec* ParameterTable::find_if(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &parameters[found->second];
}

const ParameterSpec& ParameterTable::find(const std::string& name) const {
  const ParameterSpec* spec = find_if(name);
  MESHLOOM_CHECK(spec != nullptr, "model.parameters",
                 fmt::format("no parameter is named \"{}\"", name));
  return *spec;
}

std::int64_t ParameterTable::append(ParameterSpec spec) {
  spec.offset = elements;
  MESHLOOM_CHECK(index_.emplace(spec.name, parameters.size()).second, "model.parameters",
                 fmt::format("the name \"{}\" is already taken", spec.name));
  std::int64_t extent = 1;
  bool overflow = false;
  for (const std::int64_t size : spec.shape) {
    overflow = __builtin_mul_overflow(extent, size, &extent) || overflow;
  }
  overflow = __builtin_add_overflow(elements, extent, &elements) || overflow;
  MESHLOOM_CHECK(!overflow, "model.parameters",
                 fmt::format("the model has too many elements to count, at \"{}\"", spec.name));
  parameters.push_back(std::move(spec));
  return parameters.back().offset;
}

ParameterTable parameter_table(const ModelConfig& config,
                               std::pair<std::int64_t, std::int64_t> layers, bool with_embedding,
                               bool with_head, TensorShard shard) {
  const auto [first, last] = layers;
  MESHLOOM_CHECK(
      0 <= first && first <= last && last <= config.layers, "model.parameter_table",
      fmt::format("layers [{}, {}) of a model of {} layers", first, last, config.layers));
  config.validate();
  check_shard(config, shard);
  TableBuilder builder(config, shard);
  const bool tied = config.tie_word_embeddings;
  if (with_embedding || (with_head && tied)) builder.embedding();
  for (std::int64_t layer = first; layer < last; ++layer) builder.layer(layer);
  if (with_head) builder.head(tied);
  return builder.take();
}

std::pair<std::int64_t, std::int64_t> shard_range(std::int64_t size, TensorShard shard) {
  return {size * shard.rank / shard.ranks, size * (shard.rank + 1) / shard.ranks};
}

ModelConfig shard_config(const ModelConfig& config, TensorShard shard) {
  check_shard(config, shard);
  const auto part = [&](std::int64_t size) {
    const auto [begin, end] = shard_range(size, shard);
    return end - begin;
  };
  ModelConfig result = config;
  result.heads = part(config.heads);
  result.kv_heads = config.kv_heads < shard.ranks ? 1 : part(config.kv_heads);
  result.intermediate_size = part(config.intermediate_size);
  result.vocab_size = part(config.vocab_size);
  return result;
}

ParameterHandle parameter_handle(const ParameterTable& table, const std::string& first,
                                 std::vector<std::int64_t> shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  const ParameterSpec& start = table.find(first);
  const std::int64_t end = start.offset + count;
  std::int64_t boundary = start.offset;
  for (auto spec = &start; spec != table.parameters.data() + table.parameters.size(); ++spec) {
    boundary = spec->offset + spec->elements();
    if (boundary >= end) break;
  }
  MESHLOOM_CHECK(boundary == end, "model.parameter_handle",
                 fmt::format("a view [{}] from \"{}\" on does not end with a parameter",
                             fmt::join(shape, ", "), first));
  return {start.offset, std::move(shape)};
}

void initialize_(at::Tensor& values, const ParameterTable& table, double range,
                 std::uint64_t seed) {
  MESHLOOM_CHECK_EQ(values.numel(), table.elements, "model.initialize", "elements of values");
  MESHLOOM_CHECK(values.is_contiguous(), "model.initialize", "values is not contiguous");
  // Blocks bound the host copy where the buffer is on a device or in half precision.
  constexpr std::int64_t kBlock = 1 << 20;
  for (const ParameterSpec& spec : table.parameters) {
    at::Tensor target = values.narrow(0, spec.offset, spec.elements());
    if (spec.ones || spec.zeros) {
      target.fill_(spec.ones ? 1.0 : 0.0);
      continue;
    }
    const std::uint64_t key = random_key(spec.name, seed);
    for (std::int64_t begin = 0; begin < spec.elements(); begin += kBlock) {
      const std::int64_t count = std::min(kBlock, spec.elements() - begin);
      // Drawn in double and rounded once, so that every dtype starts from the same numbers.
      at::Tensor block = at::empty({count}, at::TensorOptions().dtype(at::kDouble));
      double* data = block.data_ptr<double>();
      at::parallel_for(0, count, 1 << 13, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t i = from; i < to; ++i) {
          data[i] = range * random_normal(key, whole_index(spec, begin + i));
        }
      });
      target.narrow(0, begin, count).copy_(block);
    }
  }
}

}  // namespace meshloom::model
