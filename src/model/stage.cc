#include "meshloom/model/stage.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <variant>
#include <vector>

#include "meshloom/core/check.h"
#include "model/internal/layers.h"

namespace meshloom::model {
namespace {

using detail::AttentionLayer;
using detail::DenseLayer;
using detail::HeldWeight;
using detail::LatentAttentionLayer;
using detail::MoeLayer;
using detail::Pass;

/// The residual stream between two norms: stream + pending. The sum is only made inside the next
/// norm, in one pass over memory.
struct ResidualStream {
  at::Tensor stream;
  at::Tensor pending;  ///< undefined: nothing to add
};

/// On a device the check would cost a synchronisation: there the batch's builder makes it.
void check_vocabulary(const SequenceBatch& batch, std::int64_t vocabulary) {
  if (batch.size() == 0 || !batch.tokens.is_cpu()) return;
  const std::int64_t* tokens = batch.tokens.const_data_ptr<std::int64_t>();
  const std::int64_t* bad = std::find_if(tokens, tokens + batch.size(), [&](std::int64_t token) {
    return token < 0 || token >= vocabulary;
  });
  const std::int64_t row = bad - tokens;
  if (row == batch.size()) return;
  std::int64_t first = 0;
  std::int64_t sample = -1;
  for (const DocumentSlice& document : batch.documents) {
    if (row < first + document.tokens()) {
      sample = document.sample;
      break;
    }
    first += document.tokens();
  }
  throw InvalidArgument(
      "model.stage",
      fmt::format("sample {}: token {} at position {} is outside the vocabulary of {}", sample,
                  *bad, batch.positions[row].item<std::int64_t>(), vocabulary));
}

/// Hands the balance loss's gradient of a layer on and keeps it, or gives back what was kept:
/// routing that is computed again must not be counted again.
class BalanceTape final : public RouterBalance {
 public:
  explicit BalanceTape(RouterBalance* balance) : balance_(balance) {}
  explicit BalanceTape(at::Tensor kept) : kept_(std::move(kept)) {}
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const SequenceBatch& batch) override {
    if (balance_ != nullptr) {
      kept_ = std::exchange(balance_, nullptr)->observe(layer, probabilities, experts, batch);
    }
    return kept_;
  }
  [[nodiscard]] const at::Tensor& kept() const { return kept_; }

 private:
  RouterBalance* balance_ = nullptr;
  at::Tensor kept_;
};

/// One decoder layer: two norms, attention, and a dense or mixture-of-experts layer.
class DecoderLayer {
 public:
  DecoderLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer)
      : layer_(layer),
        eps_(config.rms_norm_eps),
        attention_(config.latent.kv_lora_rank > 0
                       ? Attention(LatentAttentionLayer(config, table, layer))
                       : Attention(AttentionLayer(config, table, layer))),
        mlp_(config.moe_layers.at(std::size_t(layer))
                 ? std::variant<DenseLayer, MoeLayer>(MoeLayer(config, table, layer))
                 : std::variant<DenseLayer, MoeLayer>(DenseLayer(config, table, layer))) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    const std::vector<std::int64_t> shape{config.hidden_size};
    input_norm_ = parameter_handle(table, prefix + "input_layernorm.weight", shape);
    post_norm_ = parameter_handle(table, prefix + "post_attention_layernorm.weight", shape);
  }

  [[nodiscard]] std::int64_t index() const { return layer_; }

  void forward(Pass& pass, ResidualStream& h) const {
    if (!recomputes(pass)) return forward_kept(pass, h);
    if (h.pending.defined()) h = {h.pending.add_(h.stream), {}};
    pass.save(Activation::kLayerInput, h.stream);
    StageContext bare = pass.context;
    BalanceTape tape(pass.context.balance);
    if (bare.balance != nullptr) bare.balance = &tape;
    bare.gradients = nullptr;
    bare.activations = nullptr;
    Pass unsaved{bare, pass.tables};
    forward_kept(unsaved, h);
    pass.z_loss_sum += unsaved.z_loss_sum;
    pass.save(Activation::kRouting, tape.kept());
  }

  /// dh becomes the gradient of the layer's input.
  void backward(Pass& pass, at::Tensor& dh) const {
    if (!recomputes(pass)) {
      backward_kept(pass, dh);
    } else {
      BalanceTape tape(pass.restore(Activation::kRouting));
      ResidualStream h{pass.restore(Activation::kLayerInput), {}};
      ResidentActivations activations;
      StageContext again = pass.context;
      if (again.balance != nullptr) again.balance = &tape;
      again.activations = &activations;
      Pass saved{again, pass.tables};
      forward_kept(saved, h);
      h = {};
      backward_kept(saved, dh);
    }
    pass.context.gradients->layer_done(layer_);
  }

 private:
  static bool recomputes(const Pass& pass) {
    return pass.saves() && pass.context.recompute == Recompute::kFull;
  }

  void forward_kept(Pass& pass, ResidualStream& h) const {
    at::Tensor x = normalize(pass, h, input_norm_);
    h.pending = std::visit([&](const auto& layer) { return layer.forward(pass, x); }, attention_);
    pass.save(Activation::kLayerInput, h.stream);
    x = normalize(pass, h, post_norm_);
    h.pending = std::visit([&](const auto& mlp) { return mlp.forward(pass, x); }, mlp_);
    pass.save(Activation::kLayerInput, h.stream);
  }

  void backward_kept(Pass& pass, at::Tensor& dh) const {
    sublayer_backward(pass, dh, post_norm_, [&](const at::Tensor& x) {
      return std::visit([&](const auto& mlp) { return mlp.backward(pass, dh, x); }, mlp_);
    });
    sublayer_backward(pass, dh, input_norm_, [&](const at::Tensor& x) {
      return std::visit([&](const auto& layer) { return layer.backward(pass, dh, x); }, attention_);
    });
  }

  /// Settles what is pending and returns the norm of the stream.
  at::Tensor normalize(const Pass& pass, ResidualStream& h, const ParameterHandle& norm) const {
    const HeldWeight weight(pass.context.parameters, norm);
    if (!h.pending.defined()) return ops::rms_norm(h.stream, *weight, eps_).y;
    at::Tensor sum = std::move(h.pending);
    at::Tensor x = ops::add_rms_norm_(sum, h.stream, *weight, eps_).y;
    h = {std::move(sum), {}};
    return x;
  }

  template <class Backward>
  void sublayer_backward(Pass& pass, at::Tensor& dh, const ParameterHandle& norm,
                         const Backward& backward) const {
    const at::Tensor input = pass.restore(Activation::kLayerInput);
    const HeldWeight weight(pass.context.parameters, norm);
    at::Tensor dx;
    at::Tensor rstd;
    {
      ops::NormOutput again = ops::rms_norm(input, *weight, eps_);
      rstd = std::move(again.rstd);
      dx = backward(again.y);
    }
    if (pass.context.gradients->deferred()) dh = dh.clone();  // the sink holds on to it
    pass.context.gradients->add(norm, ops::rms_norm_backward_(dh, dx, input, *weight, rstd));
  }

  using Attention = std::variant<AttentionLayer, LatentAttentionLayer>;

  std::int64_t layer_;
  double eps_;
  Attention attention_;
  std::variant<DenseLayer, MoeLayer> mlp_;
  ParameterHandle input_norm_;
  ParameterHandle post_norm_;
};

class DecoderStage final : public Stage {
 public:
  DecoderStage(const ModelConfig& config, std::pair<std::int64_t, std::int64_t> layers,
               bool with_embedding, bool with_head, TensorShard shard)
      : config_(config), table_(parameter_table(config, layers, with_embedding, with_head, shard)) {
    const ModelConfig own = shard_config(config, shard);
    for (std::int64_t i = layers.first; i < layers.second; ++i) {
      layers_.emplace_back(own, table_, i);
    }
    const std::vector<std::int64_t> vocabulary{own.vocab_size, config.hidden_size};
    const char* embedding = "model.embed_tokens.weight";
    if (with_embedding) embedding_ = parameter_handle(table_, embedding, vocabulary);
    if (with_head) {
      norm_ = parameter_handle(table_, "model.norm.weight", {config.hidden_size});
      head_ = parameter_handle(table_, config.tie_word_embeddings ? embedding : "lm_head.weight",
                               vocabulary);
    }
    frequencies_[0] = detail::rope_frequencies(config_, at::kFloat);
    frequencies_[1] = detail::rope_frequencies(config_, at::kDouble);
  }

  const ModelConfig& config() const override { return config_; }
  const ParameterTable& parameters() const override { return table_; }

  StageOutput forward(const StageContext& context, const at::Tensor& input) override {
    MESHLOOM_CHECK((context.gradients == nullptr) == (context.activations == nullptr),
                   "model.stage", "gradients and activations are set together or not at all");
    Pass pass{context, {}};
    ResidualStream h;
    if (embedding_) {
      check_vocabulary(context.batch, config_.vocab_size);
      const HeldWeight weight(context.parameters, embedding_);
      h.stream = context.linear.embedding(tokens_of(context.batch.tokens), *weight);
    } else {
      check_stream(context, input, "input");
      h.stream = input;
    }
    pass.tables = rope_tables(context, h.stream.scalar_type());
    for (const DecoderLayer& layer : layers_) {
      layer.forward(pass, h);
      if (pass.saves()) context.activations->layer_done(layer.index());
    }
    StageOutput output;
    output.z_loss_sum = pass.z_loss_sum;
    if (head_) {
      output.loss_sum = head_forward(pass, h);
    } else {
      output.hidden = h.pending.defined() ? h.pending.add_(h.stream) : h.stream;
    }
    if (pass.saves()) {
      pass.save(Activation::kOther, pass.tables.cos);
      pass.save(Activation::kOther, pass.tables.sin);
    }
    return output;
  }

  at::Tensor backward(const StageContext& context, const at::Tensor& dhidden) override {
    MESHLOOM_CHECK(context.gradients != nullptr && context.activations != nullptr, "model.stage",
                   "backward needs gradients and activations");
    Pass pass{context, {}};
    pass.tables.sin = pass.restore(Activation::kOther);
    pass.tables.cos = pass.restore(Activation::kOther);
    at::Tensor dh;
    if (head_) {
      dh = head_backward(pass);
    } else {
      check_stream(context, dhidden, "dhidden");
      dh = dhidden.clone();
    }
    for (auto layer = layers_.rbegin(); layer != layers_.rend(); ++layer) {
      layer->backward(pass, dh);
    }
    if (!embedding_) return dh;
    context.linear.embedding_backward(tokens_of(context.batch.tokens), dh,
                                      [&](const at::Tensor& ids, const at::Tensor& rows) {
                                        context.gradients->embedding(embedding_, ids, rows);
                                      });
    context.gradients->layer_done(-1);
    return {};
  }

 private:
  void check_stream(const StageContext& context, const at::Tensor& x, const char* name) const {
    const std::int64_t rows = context.linear.own_rows(context.batch.size()).size();
    MESHLOOM_CHECK(
        x.defined() && x.dim() == 2 && x.size(0) == rows && x.size(1) == config_.hidden_size,
        "model.stage", fmt::format("{} must be [{}, {}]", name, rows, config_.hidden_size));
  }

  static at::Tensor tokens_of(const at::Tensor& tokens) {
    return tokens.defined() ? tokens : at::empty({0}, at::TensorOptions().dtype(at::kLong));
  }

  /// Angles are computed in fp32 for fp32 and bf16, as transformers does, and in fp64 for fp64.
  ops::RopeTables rope_tables(const StageContext& context, at::ScalarType dtype) const {
    const detail::RopeFrequencies& f = frequencies_[dtype == at::kDouble ? 1 : 0];
    const at::Tensor positions = tokens_of(context.batch.positions);
    return ops::rope_tables(positions, f.inverse.to(positions.device()), f.scaling);
  }

  double head_forward(const Pass& pass, ResidualStream& h) const {
    const StageContext& context = pass.context;
    ops::NormOutput normed;
    {
      const HeldWeight weight(context.parameters, norm_);
      if (h.pending.defined()) {
        normed = ops::add_rms_norm_(h.pending, h.stream, *weight, config_.rms_norm_eps);
        h.stream = std::move(h.pending);
      } else {
        normed = ops::rms_norm(h.stream, *weight, config_.rms_norm_eps);
      }
    }
    const HeldWeight weight(context.parameters, head_);
    const at::Tensor labels = tokens_of(context.batch.labels);
    const ops::LogitGradientSink add = [&](const at::Tensor& dlogits, const at::Tensor& rows) {
      context.gradients->linear(head_, dlogits, rows);
    };
    ops::CrossEntropyOutput loss = context.linear.cross_entropy(
        normed.y, *weight, labels, context.loss_weight, pass.saves() ? &add : nullptr);
    if (!pass.saves()) return loss.loss_sum;
    pass.save(Activation::kLayerInput, h.stream);
    pass.save(Activation::kNorm, normed.rstd);
    pass.save(Activation::kHead, loss.dhidden);
    return loss.loss_sum;
  }

  at::Tensor head_backward(const Pass& pass) const {
    const at::Tensor dnormed = pass.restore(Activation::kHead);
    const at::Tensor rstd = pass.restore(Activation::kNorm);
    const at::Tensor input = pass.restore(Activation::kLayerInput);
    at::Tensor dh = at::zeros_like(dnormed);
    const HeldWeight weight(pass.context.parameters, norm_);
    pass.context.gradients->add(norm_, ops::rms_norm_backward_(dh, dnormed, input, *weight, rstd));
    pass.context.gradients->layer_done(config_.layers);
    return dh;
  }

  ModelConfig config_;
  ParameterTable table_;
  std::vector<DecoderLayer> layers_;
  ParameterHandle embedding_;
  ParameterHandle norm_;
  ParameterHandle head_;
  std::array<detail::RopeFrequencies, 2> frequencies_;  ///< fp32, fp64
};

}  // namespace

Recompute parse_recompute(const std::string& name) {
  if (name == "none") return Recompute::kNone;
  if (name == "selective") return Recompute::kSelective;
  MESHLOOM_CHECK(name == "full", "model.recompute",
                 fmt::format("got \"{}\", expected none, selective or full", name));
  return Recompute::kFull;
}

std::unique_ptr<Stage> build_stage(const ModelConfig& config,
                                   std::pair<std::int64_t, std::int64_t> layers,
                                   bool with_embedding, bool with_head, TensorShard shard) {
  return std::make_unique<DecoderStage>(config, layers, with_embedding, with_head, shard);
}

}  // namespace meshloom::model
