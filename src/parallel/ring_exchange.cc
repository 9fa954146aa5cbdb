#include "meshloom/parallel/ring_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/ring_engine.h"

namespace meshloom::parallel {

RingExchange::RingExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans,
                           std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions options) {
  const int index = detail::member_index(hdp, ranks, "parallel.ring_exchange");
  if (!buffers) buffers = std::make_shared<ExchangeBuffers>();
  engine_ = std::make_unique<detail::RingEngine>(std::move(hdp), std::move(ranks), index,
                                                 std::move(spans), std::move(buffers), options);
}

RingExchange::~RingExchange() = default;

model::AttentionOutput RingExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const model::SequenceBatch& batch,
                                             const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  auto out = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  auto lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);
  const auto runs = detail::head_runs(0, q.size(1), q.size(1) / k.size(1));
  engine_->forward_(out, lse, q, k, v, batch, options, runs);
  return {.out = out.to(q.scalar_type()), .lse = lse};
}

model::AttentionGradients RingExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                 const at::Tensor& k, const at::Tensor& v,
                                                 const model::AttentionOutput& forward,
                                                 const model::SequenceBatch& batch,
                                                 const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  const auto delta = model::attention_delta(dout, forward.out);
  const auto runs = detail::head_runs(0, q.size(1), q.size(1) / k.size(1));
  auto dq = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  auto dk = at::zeros({k.size(0), k.size(1), k.size(2)}, statistics);
  auto dv = at::zeros({k.size(0), k.size(1), k.size(2)}, statistics);
  engine_->backward_(dq, dk, dv, dout, q, k, v, forward.lse, delta, batch, options, runs);
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = dk.to(type), .dv = dv.to(type)};
}

}  // namespace meshloom::parallel
