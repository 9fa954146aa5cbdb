#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <limits>

#include "meshloom/core/check.h"
#include "meshloom/model/activation_store.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/model/ops.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/model/token_dispatcher.h"

// What a single rank puts behind the seams.
namespace meshloom::model {
namespace {

std::vector<AttentionBlock> whole_documents(const SequenceBatch& batch) {
  std::vector<AttentionBlock> blocks;
  blocks.reserve(batch.documents.size());
  std::int64_t row = 0;
  for (const DocumentSlice& document : batch.documents) {
    const std::int64_t rows = document.tokens();
    MESHLOOM_CHECK(rows == document.length && document.ranges[0].size() == rows,
                   "model.local_attention",
                   fmt::format("sample {}: this rank holds {} of {} tokens, expected all",
                               document.sample, rows, document.length));
    if (rows > 0) blocks.push_back({row, rows, 0, row, rows, 0});
    row += rows;
  }
  return blocks;
}

at::TensorOptions statistics_like(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

}  // namespace

AttentionOutput LocalAttention::forward(const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& v, const SequenceBatch& batch,
                                        const AttentionOptions& options) {
  const auto blocks = whole_documents(batch);
  const at::TensorOptions stat = statistics_like(q);
  at::Tensor out = at::zeros({q.size(0), q.size(1), v.size(2)}, stat);
  at::Tensor lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), stat);
  attention_forward_(out, lse, q, k, v, blocks, options);
  return {out.to(q.scalar_type()), lse};
}

AttentionGradients LocalAttention::backward(const at::Tensor& dout, const at::Tensor& q,
                                            const at::Tensor& k, const at::Tensor& v,
                                            const AttentionOutput& forward,
                                            const SequenceBatch& batch,
                                            const AttentionOptions& options) {
  const auto blocks = whole_documents(batch);
  const at::TensorOptions stat = statistics_like(q);
  const at::Tensor delta = attention_delta(dout, forward.out);
  AttentionGradients result{at::zeros({q.size(0), q.size(1), q.size(2)}, stat),
                            at::zeros({k.size(0), k.size(1), k.size(2)}, stat),
                            at::zeros({v.size(0), v.size(1), v.size(2)}, stat)};
  attention_backward_(result.dq, result.dk, result.dv, dout, q, k, v, forward.lse, delta, blocks,
                      options);
  return result;
}

DispatchedTokens LocalDispatcher::dispatch(const at::Tensor& x, const at::Tensor& experts,
                                           ExpertLayer of) {
  ops::ExpertOrder order = ops::sort_by_expert(experts, of.experts);
  at::Tensor rows = ops::gather_rows(x, order.source, experts.size(1));
  return {std::move(rows), std::move(order.rows), std::move(order.source)};
}

at::Tensor LocalDispatcher::rows_again(const at::Tensor& x, const DispatchedTokens& routing,
                                       std::int64_t experts_per_token) {
  return ops::gather_rows(x, routing.source, experts_per_token);
}

at::Tensor LocalDispatcher::combine(const at::Tensor& y, const DispatchedTokens& routing,
                                    const at::Tensor& weights) {
  return ops::combine_rows(y, routing.source, weights);
}

CombineGradients LocalDispatcher::combine_backward(const at::Tensor& dout,
                                                   const DispatchedTokens& routing,
                                                   const at::Tensor& weights) {
  return {ops::gather_rows(dout, routing.source, weights.size(1)),
          weights.reshape({-1}).index_select(0, routing.source)};
}

DispatchGradients LocalDispatcher::dispatch_backward(const at::Tensor& drows,
                                                     const at::Tensor& dweights,
                                                     const DispatchedTokens& routing,
                                                     std::int64_t tokens,
                                                     std::int64_t experts_per_token) {
  at::Tensor weights = at::empty({tokens * experts_per_token}, dweights.options());
  weights.index_copy_(0, routing.source, dweights);
  return {ops::gather_rows_backward(drows, routing.source, tokens, experts_per_token),
          weights.view({tokens, experts_per_token})};
}

at::Tensor LocalLinear::column(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias) {
  return ops::matmul_nt(x, weight, bias);
}

at::Tensor LocalLinear::row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return ops::matmul_nt(x, weight, bias);
}

at::Tensor LocalLinear::column_backward(const at::Tensor& dy, const at::Tensor& weight,
                                        const at::Tensor& x, const WeightGradient& add) {
  add(x);
  return ops::matmul_nn(dy, weight);
}

ShardedLinear::RowGradients LocalLinear::row_backward(const at::Tensor& dy,
                                                      const at::Tensor& weight) {
  return {ops::matmul_nn(dy, weight), dy};
}

at::Tensor LocalLinear::embedding(const at::Tensor& tokens, const at::Tensor& weight) {
  return ops::embedding(weight, tokens);
}

void LocalLinear::embedding_backward(
    const at::Tensor& tokens, const at::Tensor& dy,
    const std::function<void(const at::Tensor& ids, const at::Tensor& rows)>& add) {
  add(tokens, dy);
}

ops::CrossEntropyOutput LocalLinear::cross_entropy(const at::Tensor& hidden,
                                                   const at::Tensor& weight,
                                                   const at::Tensor& labels, double loss_weight,
                                                   const ops::LogitGradientSink* add) {
  return add == nullptr ? ops::linear_cross_entropy_loss(hidden, weight, labels)
                        : ops::linear_cross_entropy(hidden, weight, labels, loss_weight, *add);
}

void ResidentActivations::push(Activation kind, at::Tensor tensor) {
  entries_.push_back({kind, std::move(tensor)});
}

at::Tensor ResidentActivations::pop(Activation kind) {
  MESHLOOM_CHECK(!entries_.empty(), "model.activations", "pop from an empty store");
  MESHLOOM_CHECK_EQ(static_cast<int>(entries_.back().kind), static_cast<int>(kind),
                    "model.activations", "kind of the activation on top");
  at::Tensor tensor = std::move(entries_.back().tensor);
  entries_.pop_back();
  return tensor;
}

std::int64_t ResidentActivations::bytes() const {
  std::int64_t total = 0;
  for (const Entry& entry : entries_) {
    if (entry.tensor.defined()) total += static_cast<std::int64_t>(entry.tensor.nbytes());
  }
  return total;
}

}  // namespace meshloom::model
