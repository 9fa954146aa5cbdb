#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <utility>

#include "model/internal/layers.h"

namespace meshloom::model::detail {
namespace {

// transformers gives the norms of latents no epsilon of the config's but its default.
constexpr double kLatentEps = 1e-6;

}  // namespace

LatentAttentionLayer::LatentAttentionLayer(const ModelConfig& config, const ParameterTable& table,
                                           std::int64_t layer)
    : heads_(config.heads),
      sizes_(config.latent),
      options_{.scale = attention_scale(config), .window = 0} {
  const std::string prefix = fmt::format("model.layers.{}.self_attn.", layer);
  const std::int64_t hidden = config.hidden_size;
  const bool q_latent = sizes_.q_lora_rank > 0;
  const std::int64_t width = sizes_.q_lora_rank + sizes_.kv_lora_rank + sizes_.qk_rope_head_dim;
  const std::string first = prefix + (q_latent ? "q_a_proj" : "kv_a_proj_with_mqa");
  down_.weight = parameter_handle(table, first + ".weight", {width, hidden});
  if (config.qkv_bias) down_.bias = parameter_handle(table, first + ".bias", {width});
  if (q_latent) {
    q_norm_ = parameter_handle(table, prefix + "q_a_layernorm.weight", {sizes_.q_lora_rank});
  }
  kv_norm_ = parameter_handle(table, prefix + "kv_a_layernorm.weight", {sizes_.kv_lora_rank});
  queries_.weight =
      parameter_handle(table, prefix + (q_latent ? "q_b_proj.weight" : "q_proj.weight"),
                       {heads_ * config.head_dim, q_latent ? sizes_.q_lora_rank : hidden});
  keys_.weight = parameter_handle(
      table, prefix + "kv_b_proj.weight",
      {heads_ * (sizes_.qk_nope_head_dim + sizes_.v_head_dim), sizes_.kv_lora_rank});
  output_.weight =
      parameter_handle(table, prefix + "o_proj.weight", {hidden, heads_ * sizes_.v_head_dim});
  if (config.output_bias) {
    output_.bias = parameter_handle(table, prefix + "o_proj.bias", {hidden});
  }
}

void LatentAttentionLayer::rotate(const Pass& pass, at::Tensor part, bool back) const {
  ops::rotate_(part, pass.tables, sizes_.interleaved_rope, back);
}

LatentAttentionLayer::Queries LatentAttentionLayer::queries(const Pass& pass,
                                                            const at::Tensor& latents,
                                                            const at::Tensor& x) const {
  const StageContext& context = pass.context;
  Queries result;
  if (q_norm_) {
    const HeldWeight weight(context.parameters, q_norm_);
    result.normed = ops::rms_norm(latents.narrow(1, 0, sizes_.q_lora_rank), *weight, kLatentEps);
  }
  const HeldWeight weight(context.parameters, queries_.weight);
  result.q = context.linear.column(q_norm_ ? result.normed.y : x, *weight, {})
                 .view({-1, heads_, sizes_.qk_nope_head_dim + sizes_.qk_rope_head_dim});
  rotate(pass, result.q.narrow(2, sizes_.qk_nope_head_dim, sizes_.qk_rope_head_dim), false);
  return result;
}

LatentAttentionLayer::Latents LatentAttentionLayer::latents_of_keys(
    const Pass& pass, const at::Tensor& latents) const {
  const StageContext& context = pass.context;
  const HeldWeight weight(context.parameters, kv_norm_);
  Latents result;
  result.normed = ops::rms_norm(latents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank), *weight,
                                kLatentEps);
  const at::Tensor shared =
      latents.narrow(1, sizes_.q_lora_rank + sizes_.kv_lora_rank, sizes_.qk_rope_head_dim);
  result.rows = context.linear.all_rows(at::cat({result.normed.y, shared}, 1));
  rotate(pass, shared_part(result.rows), false);
  return result;
}

at::Tensor LatentAttentionLayer::shared_part(const at::Tensor& rows) const {
  return rows.narrow(1, sizes_.kv_lora_rank, sizes_.qk_rope_head_dim).unsqueeze(1);
}

KeysAndValues LatentAttentionLayer::expand(const StageContext& context,
                                           const at::Tensor& rows) const {
  const std::int64_t nope = sizes_.qk_nope_head_dim;
  const HeldWeight weight(context.parameters, keys_.weight);
  const at::Tensor both =
      ops::matmul_nt(rows.narrow(1, 0, sizes_.kv_lora_rank).contiguous(), *weight)
          .view({rows.size(0), heads_, nope + sizes_.v_head_dim});
  KeysAndValues result;
  result.k = at::empty({rows.size(0), heads_, nope + sizes_.qk_rope_head_dim}, both.options());
  result.k.narrow(2, 0, nope).copy_(both.narrow(2, 0, nope));
  result.k.narrow(2, nope, sizes_.qk_rope_head_dim).copy_(shared_part(rows));
  result.v = both.narrow(2, nope, sizes_.v_head_dim);
  return result;
}

at::Tensor LatentAttentionLayer::contract(const StageContext& context, const at::Tensor& rows,
                                          const at::Tensor& dk, const at::Tensor& dv) const {
  const std::int64_t nope = sizes_.qk_nope_head_dim;
  at::Tensor both = at::empty({rows.size(0), heads_, nope + sizes_.v_head_dim}, rows.options());
  both.narrow(2, 0, nope).copy_(dk.narrow(2, 0, nope));
  both.narrow(2, nope, sizes_.v_head_dim).copy_(dv);
  both = both.flatten(1);
  const at::Tensor latents = rows.narrow(1, 0, sizes_.kv_lora_rank).contiguous();
  at::Tensor drows = at::empty(rows.sizes(), rows.options());
  {
    const HeldWeight weight(context.parameters, keys_.weight);
    drows.narrow(1, 0, sizes_.kv_lora_rank).copy_(ops::matmul_nn(both, *weight));
  }
  shared_part(drows).copy_(dk.narrow(2, nope, sizes_.qk_rope_head_dim).sum({1}, true));
  context.gradients->linear(keys_.weight, both, latents);
  return drows;
}

/// What a pass's exchange makes keys and values from.
class LatentAttentionLayer::Expansion final : public LatentKeys {
 public:
  Expansion(const LatentAttentionLayer& layer, const StageContext& context, at::Tensor rows)
      : layer_(layer), context_(context), rows_(std::move(rows)) {}

  [[nodiscard]] const at::Tensor& rows() const override { return rows_; }
  [[nodiscard]] KeysAndValues expand(const at::Tensor& rows) const override {
    return layer_.expand(context_, rows);
  }
  [[nodiscard]] at::Tensor contract(const at::Tensor& rows, const at::Tensor& dk,
                                    const at::Tensor& dv) override {
    return layer_.contract(context_, rows, dk, dv);
  }

 private:
  const LatentAttentionLayer& layer_;
  const StageContext& context_;
  at::Tensor rows_;
};

at::Tensor LatentAttentionLayer::forward(Pass& pass, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  at::Tensor latents;
  {
    const HeldWeight weight(context.parameters, down_.weight);
    const HeldWeight bias(context.parameters, down_.bias);
    latents = ops::matmul_nt(x, *weight, *bias);
  }
  AttentionOutput attention;
  {
    const Queries q = queries(pass, latents, x);
    const Expansion keys(*this, context, latents_of_keys(pass, latents).rows);
    attention = context.attention.forward_latent(q.q, keys, context.batch, options_);
    if (!q_norm_) pass.save(Activation::kQkv, q.q);
  }
  pass.save(Activation::kQkv, latents);
  pass.save(Activation::kAttention, attention.out);
  pass.save(Activation::kLogSumExp, attention.lse);
  const HeldWeight weight(context.parameters, output_.weight);
  const HeldWeight bias(context.parameters, output_.bias);
  return context.linear.row(attention.out.flatten(1), *weight, *bias);
}

at::Tensor LatentAttentionLayer::queries_backward(const Pass& pass, const at::Tensor& dq,
                                                  const Queries& queries, const at::Tensor& latents,
                                                  const at::Tensor& x,
                                                  const at::Tensor& dlatents) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  // Of the compute type, and not what the exchange may still hold.
  at::Tensor gradient = at::empty(dq.sizes(), x.options());
  gradient.copy_(dq);
  rotate(pass, gradient.narrow(2, sizes_.qk_nope_head_dim, sizes_.qk_rope_head_dim), true);
  gradient = gradient.flatten(1);
  at::Tensor dinput;
  {
    const HeldWeight weight(context.parameters, queries_.weight);
    dinput = context.linear.column_backward(
        gradient, *weight, q_norm_ ? queries.normed.y : x,
        [&](const at::Tensor& all) { sink.linear(queries_.weight, gradient, all); });
  }
  if (!q_norm_) return dinput;
  const HeldWeight weight(context.parameters, q_norm_);
  at::Tensor dlatent = dlatents.narrow(1, 0, sizes_.q_lora_rank);
  sink.add(q_norm_,
           ops::rms_norm_backward_(dlatent, dinput, latents.narrow(1, 0, sizes_.q_lora_rank),
                                   *weight, queries.normed.rstd));
  return {};
}

void LatentAttentionLayer::latents_backward(const Pass& pass, const at::Tensor& drows,
                                            const ops::NormOutput& normed,
                                            const at::Tensor& latents,
                                            const at::Tensor& dlatents) const {
  const StageContext& context = pass.context;
  rotate(pass, shared_part(drows), true);
  const at::Tensor own = context.linear.all_rows_backward(drows);
  dlatents.narrow(1, sizes_.q_lora_rank + sizes_.kv_lora_rank, sizes_.qk_rope_head_dim)
      .copy_(own.narrow(1, sizes_.kv_lora_rank, sizes_.qk_rope_head_dim));
  const HeldWeight weight(context.parameters, kv_norm_);
  at::Tensor dlatent = dlatents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank);
  context.gradients->add(
      kv_norm_, ops::rms_norm_backward_(dlatent, own.narrow(1, 0, sizes_.kv_lora_rank).contiguous(),
                                        latents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank),
                                        *weight, normed.rstd));
}

at::Tensor LatentAttentionLayer::backward(Pass& pass, const at::Tensor& dy,
                                          const at::Tensor& x) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  AttentionOutput attention;
  attention.lse = pass.restore(Activation::kLogSumExp);
  attention.out = pass.restore(Activation::kAttention);
  const at::Tensor latents = pass.restore(Activation::kQkv);
  const Queries q = q_norm_ ? queries(pass, latents, x)
                            : Queries{.normed = {}, .q = pass.restore(Activation::kQkv)};
  Latents of_keys = latents_of_keys(pass, latents);

  at::Tensor dout = output_backward(context, output_, dy, attention.out);

  LatentGradients gradients;
  {
    Expansion keys(*this, context, std::move(of_keys.rows));
    gradients =
        context.attention.backward_latent(dout, q.q, keys, attention, context.batch, options_);
  }
  dout.reset();
  attention = {};
  const at::Tensor dlatents = at::zeros(latents.sizes(), latents.options());
  latents_backward(pass, gradients.drows, of_keys.normed, latents, dlatents);
  at::Tensor dx = queries_backward(pass, gradients.dq, q, latents, x, dlatents);
  gradients = {};
  sink.linear(down_.weight, dlatents, x);
  if (down_.bias) sink.add(down_.bias, ops::column_sum(dlatents));
  const HeldWeight weight(context.parameters, down_.weight);
  if (!dx.defined()) return ops::matmul_nn(dlatents, *weight);
  ops::matmul_nn_add_(dx, dlatents, *weight);
  return dx;
}

}  // namespace meshloom::model::detail
