#include "meshloom/model/parameters.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "meshloom/core/check.h"
#include "meshloom/core/random.h"

namespace meshloom::model {
namespace {

/// Appends a model's parameters in flat order.
class TableBuilder {
 public:
  explicit TableBuilder(const ModelConfig& config) : config_(config) {}

  void weight(const std::string& name, std::vector<std::int64_t> shape, bool decay = true,
              std::int64_t expert = -1) {
    table_.append(
        {.name = name + ".weight", .shape = std::move(shape), .decay = decay, .expert = expert});
  }
  void bias(const std::string& name, std::int64_t size) {
    table_.append({.name = name + ".bias", .shape = {size}, .decay = false, .zeros = true});
  }
  void norm(const std::string& name, std::int64_t size) {
    table_.append({.name = name + ".weight", .shape = {size}, .decay = false, .ones = true});
  }

  void embedding() {
    weight("model.embed_tokens", {config_.vocab_size, config_.hidden_size}, false);
  }

  void layer(std::int64_t index) {
    const std::string prefix = fmt::format("model.layers.{}.", index);
    norm(prefix + "input_layernorm", config_.hidden_size);
    attention(prefix + "self_attn.");
    norm(prefix + "post_attention_layernorm", config_.hidden_size);
    if (config_.moe_layers.at(std::size_t(index))) {
      experts(prefix);
    } else {
      dense(prefix + "mlp.");
    }
  }

  ParameterTable take() { return std::move(table_); }

 private:
  void attention(const std::string& prefix) {
    const std::int64_t q = config_.heads * config_.head_dim;
    const std::int64_t kv = config_.kv_heads * config_.head_dim;
    weight(prefix + "q_proj", {q, config_.hidden_size});
    weight(prefix + "k_proj", {kv, config_.hidden_size});
    weight(prefix + "v_proj", {kv, config_.hidden_size});
    if (config_.qkv_bias) {
      bias(prefix + "q_proj", q);
      bias(prefix + "k_proj", kv);
      bias(prefix + "v_proj", kv);
    }
    if (config_.qk_norm) {
      norm(prefix + "q_norm", config_.head_dim);
      norm(prefix + "k_norm", config_.head_dim);
    }
    weight(prefix + "o_proj", {config_.hidden_size, q});
    if (config_.output_bias) bias(prefix + "o_proj", config_.hidden_size);
  }

  void dense(const std::string& prefix) {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.intermediate_size;
    weight(prefix + "gate_proj", {inner, hidden});
    weight(prefix + "up_proj", {inner, hidden});
    if (config_.mlp_bias) {
      bias(prefix + "gate_proj", inner);
      bias(prefix + "up_proj", inner);
    }
    weight(prefix + "down_proj", {hidden, inner});
    if (config_.mlp_bias) bias(prefix + "down_proj", hidden);
  }

  void experts(const std::string& layer) {
    const bool mixtral = config_.model_type == "mixtral";
    const std::string prefix = layer + (mixtral ? "block_sparse_moe." : "mlp.");
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t inner = config_.moe.intermediate_size;
    const auto expert = [&](std::int64_t e, const char* name) {
      return fmt::format("{}experts.{}.{}", prefix, e, name);
    };
    weight(prefix + "gate", {config_.moe.experts, hidden});
    for (std::int64_t e = 0; e < config_.moe.experts; ++e) {
      weight(expert(e, mixtral ? "w1" : "gate_proj"), {inner, hidden}, true, e);
      weight(expert(e, mixtral ? "w3" : "up_proj"), {inner, hidden}, true, e);
    }
    for (std::int64_t e = 0; e < config_.moe.experts; ++e) {
      weight(expert(e, mixtral ? "w2" : "down_proj"), {hidden, inner}, true, e);
    }
  }

  const ModelConfig& config_;
  ParameterTable table_;
};

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
                               bool with_head) {
  const auto [first, last] = layers;
  MESHLOOM_CHECK(
      0 <= first && first <= last && last <= config.layers, "model.parameter_table",
      fmt::format("layers [{}, {}) of a model of {} layers", first, last, config.layers));
  config.validate();
  TableBuilder builder(config);
  const bool tied = config.tie_word_embeddings;
  if (with_embedding || (with_head && tied)) builder.embedding();
  for (std::int64_t layer = first; layer < last; ++layer) builder.layer(layer);
  if (with_head) {
    builder.norm("model.norm", config.hidden_size);
    if (!tied) builder.weight("lm_head", {config.vocab_size, config.hidden_size});
  }
  return builder.take();
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
          data[i] = range * random_normal(key, static_cast<std::uint64_t>(begin + i));
        }
      });
      target.narrow(0, begin, count).copy_(block);
    }
  }
}

}  // namespace meshloom::model
