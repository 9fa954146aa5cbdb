#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

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

LatentAttentionLayer::Keys LatentAttentionLayer::keys(const Pass& pass,
                                                      const at::Tensor& latents) const {
  const StageContext& context = pass.context;
  const std::int64_t nope = sizes_.qk_nope_head_dim;
  const std::int64_t rope = sizes_.qk_rope_head_dim;
  Keys result;
  {
    const HeldWeight weight(context.parameters, kv_norm_);
    result.normed = ops::rms_norm(latents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank),
                                  *weight, kLatentEps);
  }
  const HeldWeight weight(context.parameters, keys_.weight);
  const at::Tensor both = context.linear.column(result.normed.y, *weight, {})
                              .view({-1, heads_, nope + sizes_.v_head_dim});
  const at::Tensor shared = context.linear.all_rows(
      latents.narrow(1, sizes_.q_lora_rank + sizes_.kv_lora_rank, rope).clone());
  rotate(pass, shared.unsqueeze(1), false);
  result.k = at::empty({both.size(0), heads_, nope + rope}, both.options());
  result.k.narrow(2, 0, nope).copy_(both.narrow(2, 0, nope));
  result.k.narrow(2, nope, rope).copy_(shared.unsqueeze(1));
  result.v = both.narrow(2, nope, sizes_.v_head_dim);
  return result;
}

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
    const Keys kv = keys(pass, latents);
    attention = context.attention.forward(q.q, kv.k, kv.v, context.batch, options_);
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

void LatentAttentionLayer::keys_backward(const Pass& pass, const at::Tensor& dk,
                                         const at::Tensor& dv, const Keys& keys,
                                         const at::Tensor& latents,
                                         const at::Tensor& dlatents) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  const std::int64_t nope = sizes_.qk_nope_head_dim;
  const std::int64_t rope = sizes_.qk_rope_head_dim;
  const at::Tensor shared = dk.narrow(2, nope, rope).sum({1}).to(latents.scalar_type());
  rotate(pass, shared.unsqueeze(1), true);
  dlatents.narrow(1, sizes_.q_lora_rank + sizes_.kv_lora_rank, rope)
      .copy_(context.linear.all_rows_backward(shared));

  at::Tensor both = at::empty({dk.size(0), heads_, nope + sizes_.v_head_dim}, latents.options());
  both.narrow(2, 0, nope).copy_(dk.narrow(2, 0, nope));
  both.narrow(2, nope, sizes_.v_head_dim).copy_(dv);
  both = both.flatten(1);
  at::Tensor dnormed;
  {
    const HeldWeight weight(context.parameters, keys_.weight);
    dnormed = context.linear.column_backward(
        both, *weight, keys.normed.y,
        [&](const at::Tensor& all) { sink.linear(keys_.weight, both, all); });
  }
  const HeldWeight weight(context.parameters, kv_norm_);
  at::Tensor dlatent = dlatents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank);
  sink.add(kv_norm_,
           ops::rms_norm_backward_(dlatent, dnormed,
                                   latents.narrow(1, sizes_.q_lora_rank, sizes_.kv_lora_rank),
                                   *weight, keys.normed.rstd));
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
  const Keys kv = keys(pass, latents);

  at::Tensor dout;
  {
    const HeldWeight weight(context.parameters, output_.weight);
    ShardedLinear::RowGradients through = context.linear.row_backward(dy, *weight);
    dout = through.dx.view(attention.out.sizes());
    sink.linear(output_.weight, through.dy, attention.out.flatten(1));
  }
  if (output_.bias) sink.add(output_.bias, ops::column_sum(dy));

  AttentionGradients gradients =
      context.attention.backward(dout, q.q, kv.k, kv.v, attention, context.batch, options_);
  dout.reset();
  attention = {};
  const at::Tensor dlatents = at::zeros(latents.sizes(), latents.options());
  keys_backward(pass, gradients.dk, gradients.dv, kv, latents, dlatents);
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
