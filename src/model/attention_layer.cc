#include <fmt/format.h>

#include "model/internal/layers.h"

namespace meshloom::model::detail {

at::Tensor output_backward(const StageContext& context, const LinearHandles& output,
                           const at::Tensor& dy, const at::Tensor& out) {
  ShardedLinear::RowGradients through;
  {
    const HeldWeight weight(context.parameters, output.weight);
    through = context.linear.row_backward(dy, *weight);
  }
  context.gradients->linear(output.weight, through.dy, out.flatten(1));
  if (output.bias) context.gradients->add(output.bias, ops::column_sum(dy));
  return through.dx.view(out.sizes());
}

AttentionLayer::AttentionLayer(const ModelConfig& config, const ParameterTable& table,
                               std::int64_t layer)
    : layout_{config.heads, config.kv_heads, config.head_dim},
      options_{.scale = attention_scale(config), .window = config.windows.at(std::size_t(layer))},
      eps_(config.rms_norm_eps) {
  const std::string prefix = fmt::format("model.layers.{}.self_attn.", layer);
  const std::int64_t hidden = config.hidden_size;
  qkv_.weight = parameter_handle(table, prefix + "q_proj.weight", {layout_.width(), hidden});
  if (config.qkv_bias) {
    qkv_.bias = parameter_handle(table, prefix + "q_proj.bias", {layout_.width()});
  }
  output_.weight =
      parameter_handle(table, prefix + "o_proj.weight", {hidden, config.heads * config.head_dim});
  if (config.output_bias) {
    output_.bias = parameter_handle(table, prefix + "o_proj.bias", {hidden});
  }
  if (config.qk_norm) {
    q_norm_ = parameter_handle(table, prefix + "q_norm.weight", {config.head_dim});
    k_norm_ = parameter_handle(table, prefix + "k_norm.weight", {config.head_dim});
  }
}

AttentionLayer::Heads AttentionLayer::heads(const Pass& pass, const at::Tensor& qkv) const {
  const std::int64_t tokens = qkv.size(0);
  const std::int64_t dim = layout_.head_dim;
  const at::Tensor all = qkv.view({tokens, layout_.heads + 2 * layout_.kv_heads, dim});
  const at::Tensor v = all.narrow(1, layout_.heads + layout_.kv_heads, layout_.kv_heads);
  if (!q_norm_) {
    return {all.narrow(1, 0, layout_.heads), all.narrow(1, layout_.heads, layout_.kv_heads), v};
  }
  ParameterSource& source = pass.context.parameters;
  const HeldWeight q_weight(source, q_norm_);
  const HeldWeight k_weight(source, k_norm_);
  auto [q, k] = ops::qk_norm_rope(qkv, layout_, *q_weight, *k_weight, eps_, pass.tables);
  return {q, k, v};
}

at::Tensor AttentionLayer::forward(Pass& pass, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  at::Tensor qkv;
  {
    const HeldWeight weight(context.parameters, qkv_.weight);
    const HeldWeight bias(context.parameters, qkv_.bias);
    qkv = context.linear.column(x, *weight, *bias);
  }
  if (!q_norm_) ops::rope_(qkv, layout_, pass.tables);
  AttentionOutput attention;
  {
    const Heads h = heads(pass, qkv);
    attention = context.attention.forward(h.q, h.k, h.v, context.batch, options_);
  }
  // With q/k norms this is the projection's output, from which backward makes q and k again.
  pass.save(Activation::kQkv, qkv);
  pass.save(Activation::kAttention, attention.out);
  pass.save(Activation::kLogSumExp, attention.lse);
  const HeldWeight weight(context.parameters, output_.weight);
  const HeldWeight bias(context.parameters, output_.bias);
  return context.linear.row(attention.out.flatten(1), *weight, *bias);
}

at::Tensor AttentionLayer::backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  AttentionOutput attention;
  attention.lse = pass.restore(Activation::kLogSumExp);
  attention.out = pass.restore(Activation::kAttention);
  const at::Tensor qkv = pass.restore(Activation::kQkv);

  at::Tensor dout = output_backward(context, output_, dy, attention.out);

  AttentionGradients gradients;
  {
    const Heads h = heads(pass, qkv);
    gradients = context.attention.backward(dout, h.q, h.k, h.v, attention, context.batch, options_);
  }
  dout.reset();
  attention = {};
  at::Tensor dqkv;
  if (q_norm_) {
    const HeldWeight q_weight(context.parameters, q_norm_);
    const HeldWeight k_weight(context.parameters, k_norm_);
    ops::QkNormGradients through = ops::qk_norm_rope_backward(
        gradients.dq, gradients.dk, gradients.dv, qkv, *q_weight, *k_weight, eps_, pass.tables);
    sink.add(q_norm_, through.q_weight);
    sink.add(k_norm_, through.k_weight);
    dqkv = std::move(through.dqkv);
  } else {
    dqkv = ops::rope_backward(gradients.dq, gradients.dk, gradients.dv, pass.tables,
                              qkv.scalar_type());
  }
  gradients = {};
  if (qkv_.bias) sink.add(qkv_.bias, ops::column_sum(dqkv));
  const HeldWeight weight(context.parameters, qkv_.weight);
  return context.linear.column_backward(
      dqkv, *weight, x, [&](const at::Tensor& all) { sink.linear(qkv_.weight, dqkv, all); });
}

}  // namespace meshloom::model::detail
