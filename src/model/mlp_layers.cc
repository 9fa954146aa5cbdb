#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>

#include "model/internal/layers.h"

namespace meshloom::model::detail {
namespace {

/// Tokens that each row of a balance gradient is for; empty where one row is for all.
std::vector<std::int64_t> balance_groups(const SequenceBatch& batch, const at::Tensor& balance) {
  std::vector<std::int64_t> rows;
  if (!balance.defined() || balance.size(0) == 1) return rows;
  rows.reserve(batch.documents.size());
  for (const DocumentSlice& document : batch.documents) rows.push_back(document.tokens());
  return rows;
}

at::Tensor expert_rows_tensor(const std::vector<std::int64_t>& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  at::Tensor result = at::empty({count}, at::TensorOptions().dtype(at::kLong));
  std::copy(rows.begin(), rows.end(), result.data_ptr<std::int64_t>());
  return result;
}

/// How often each expert is chosen, [experts]. Whole numbers: exact in fp32 up to 2^24.
at::Tensor choices(const at::Tensor& experts, std::int64_t count) {
  return at::bincount(experts.reshape({-1}), {}, count);
}

std::vector<std::int64_t> expert_rows_vector(const at::Tensor& rows) {
  const std::int64_t* data = rows.data_ptr<std::int64_t>();
  return {data, data + rows.numel()};
}

}  // namespace

DenseLayer::DenseLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer)
    : DenseLayer(table, fmt::format("model.layers.{}.mlp.", layer), config.hidden_size,
                 config.intermediate_size, config.mlp_bias) {}

DenseLayer::DenseLayer(const ParameterTable& table, const std::string& prefix, std::int64_t hidden,
                       std::int64_t inner, bool biased) {
  gate_up_.weight = parameter_handle(table, prefix + "gate_proj.weight", {2 * inner, hidden});
  down_.weight = parameter_handle(table, prefix + "down_proj.weight", {hidden, inner});
  if (biased) {
    gate_up_.bias = parameter_handle(table, prefix + "gate_proj.bias", {2 * inner});
    down_.bias = parameter_handle(table, prefix + "down_proj.bias", {hidden});
  }
}

at::Tensor DenseLayer::project(const Pass& pass, const at::Tensor& x) const {
  const HeldWeight weight(pass.context.parameters, gate_up_.weight);
  const HeldWeight bias(pass.context.parameters, gate_up_.bias);
  return pass.context.linear.column(x, *weight, *bias);
}

at::Tensor DenseLayer::forward(Pass& pass, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  at::Tensor gate_up = project(pass, x);
  const at::Tensor activation = ops::swiglu(gate_up);
  if (!pass.recomputes_projections()) pass.save(Activation::kMlp, gate_up);
  gate_up.reset();
  const HeldWeight weight(context.parameters, down_.weight);
  const HeldWeight bias(context.parameters, down_.bias);
  return context.linear.row(activation, *weight, *bias);
}

at::Tensor DenseLayer::backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  at::Tensor gate_up =  // becomes its gradient
      pass.recomputes_projections() ? project(pass, x) : pass.restore(Activation::kMlp);
  {
    ShardedLinear::RowGradients through;
    {
      const HeldWeight weight(context.parameters, down_.weight);
      through = context.linear.row_backward(dy, *weight);
    }
    ops::swiglu_backward_(through.dx, gate_up);
    sink.linear(down_.weight, through.dy, through.dx);
  }
  if (down_.bias) sink.add(down_.bias, ops::column_sum(dy));
  if (gate_up_.bias) sink.add(gate_up_.bias, ops::column_sum(gate_up));
  const HeldWeight weight(context.parameters, gate_up_.weight);
  return context.linear.column_backward(gate_up, *weight, x, [&](const at::Tensor& all) {
    sink.linear(gate_up_.weight, gate_up, all);
  });
}

MoeLayer::MoeLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer)
    : layer_(layer),
      experts_(config.moe.experts),
      router_options_{.top_k = config.moe.experts_per_token,
                      .normalize = config.moe.normalize_top_k,
                      .score = config.moe.score,
                      .scale = config.moe.weight_scale,
                      .groups = config.moe.groups,
                      .top_groups = config.moe.top_groups} {
  const bool mixtral = config.model_type == "mixtral";
  const std::string prefix =
      fmt::format("model.layers.{}.{}.", layer, mixtral ? "block_sparse_moe" : "mlp");
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t inner = config.moe.intermediate_size;
  router_ = parameter_handle(table, prefix + "gate.weight", {experts_, hidden});
  if (config.moe.correction_bias) {
    correction_ = parameter_handle(table, prefix + "gate.e_score_correction_bias", {experts_});
  }
  if (config.moe.shared_experts > 0) {
    // Tensor-parallel ranks hold a part of it.
    const std::string name = prefix + "shared_experts.";
    shared_.emplace(table, name, hidden, table.find(name + "gate_proj.weight").shape.front(),
                    /*biased=*/false);
  }
  const std::string first = prefix + "experts.0.";
  gate_up_ = parameter_handle(table, first + (mixtral ? "w1.weight" : "gate_proj.weight"),
                              {experts_, 2 * inner, hidden});
  down_ = parameter_handle(table, first + (mixtral ? "w2.weight" : "down_proj.weight"),
                           {experts_, hidden, inner});
}

at::Tensor MoeLayer::project(const Pass& pass, const DispatchedTokens& tokens) const {
  const HeldWeight weight(pass.context.parameters, gate_up_);
  return ops::grouped_matmul_nt(tokens.rows, *weight, tokens.expert_rows);
}

at::Tensor MoeLayer::forward(Pass& pass, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  ops::RouterOutput routed;
  {
    const HeldWeight weight(context.parameters, router_);
    const HeldWeight correction(context.parameters, correction_);
    routed = ops::route(ops::matmul_nt(x, *weight), router_options_, *correction);
  }
  pass.z_loss_sum += routed.z_sum;
  at::Tensor balance;
  if (context.balance != nullptr) {
    balance = context.balance->observe(static_cast<int>(layer_),
                                       ops::normalized_probabilities(routed, router_options_),
                                       routed.experts, context.stream);
  }
  at::Tensor shared;
  DispatchedTokens tokens;
  {
    const auto arrive = context.dispatcher.begin_dispatch(x, routed.experts, {layer_, experts_});
    if (shared_) shared = shared_->forward(pass, x);
    tokens = arrive();
  }
  at::Tensor gate_up = project(pass, tokens);
  const bool keeps_rows = context.dispatcher.keeps_rows();
  if (!keeps_rows) tokens.rows.reset();
  const at::Tensor activation = ops::swiglu(gate_up);
  if (pass.saves()) {
    if (!pass.recomputes_projections()) pass.save(Activation::kMlp, gate_up);
    if (keeps_rows) pass.save(Activation::kMlp, tokens.rows);
    pass.save(Activation::kRouting, expert_rows_tensor(tokens.expert_rows));
    pass.save(Activation::kRouting, tokens.source);
    pass.save(Activation::kRouting, routed.probabilities);
    pass.save(Activation::kRouting, routed.weights);
    pass.save(Activation::kRouting, routed.experts);
    pass.save(Activation::kRouting, routed.lse);
    pass.save(Activation::kRouting, balance);
  }
  gate_up.reset();
  tokens.rows.reset();
  at::Tensor y;
  {
    const HeldWeight weight(context.parameters, down_);
    y = ops::grouped_matmul_nt(activation, *weight, tokens.expert_rows);
  }
  at::Tensor out = context.dispatcher.combine(y, tokens, routed.weights);
  if (shared.defined()) out.add_(shared);
  return out;
}

at::Tensor MoeLayer::backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const {
  const StageContext& context = pass.context;
  WeightGradSink& sink = *context.gradients;
  const at::Tensor balance = pass.restore(Activation::kRouting);
  ops::RouterOutput routed;
  routed.lse = pass.restore(Activation::kRouting);
  routed.experts = pass.restore(Activation::kRouting);
  routed.weights = pass.restore(Activation::kRouting);
  routed.probabilities = pass.restore(Activation::kRouting);
  DispatchedTokens tokens;
  tokens.source = pass.restore(Activation::kRouting);
  tokens.expert_rows = expert_rows_vector(pass.restore(Activation::kRouting));
  if (context.dispatcher.keeps_rows()) tokens.rows = pass.restore(Activation::kMlp);

  const auto fetch_rows = [&] {
    if (tokens.rows.defined()) return;
    tokens.rows = context.dispatcher.rows_again(x, tokens, router_options_.top_k);
  };
  at::Tensor gate_up;  // becomes its gradient
  at::Tensor dshared;
  CombineGradients combined;
  {
    const auto arrive = context.dispatcher.begin_combine_backward(dy, tokens, routed.weights);
    if (pass.recomputes_projections()) {
      fetch_rows();
      gate_up = project(pass, tokens);
    } else {
      gate_up = pass.restore(Activation::kMlp);
    }
    if (shared_) dshared = shared_->backward(pass, dy, x);
    combined = arrive();
  }
  if (correction_) sink.add(correction_, choices(routed.experts, experts_));
  at::Tensor dweights;
  {
    at::Tensor activation;
    {
      const HeldWeight weight(context.parameters, down_);
      activation = ops::grouped_matmul_nn(combined.rows, *weight, tokens.expert_rows);
    }
    dweights = ops::swiglu_backward_(activation, gate_up, combined.weights);
    sink.grouped_linear(down_, combined.rows, activation, tokens.expert_rows);
  }
  combined = {};
  fetch_rows();
  sink.grouped_linear(gate_up_, gate_up, tokens.rows, tokens.expert_rows);
  tokens.rows.reset();
  at::Tensor drows;
  {
    const HeldWeight weight(context.parameters, gate_up_);
    drows = ops::grouped_matmul_nn(gate_up, *weight, tokens.expert_rows);
  }
  gate_up.reset();
  DispatchGradients dispatched = context.dispatcher.dispatch_backward(
      drows, dweights, tokens, x.size(0), router_options_.top_k);
  drows.reset();
  const at::Tensor dlogits = ops::route_backward(dispatched.weights, routed, router_options_,
                                                 balance, balance_groups(context.stream, balance),
                                                 context.z_loss_weight, x.scalar_type());
  sink.linear(router_, dlogits, x);
  const HeldWeight weight(context.parameters, router_);
  ops::matmul_nn_add_(dispatched.x, dlogits, *weight);
  if (dshared.defined()) dispatched.x.add_(dshared);
  return dispatched.x;
}

}  // namespace meshloom::model::detail
