#include "meshloom/parallel/gather_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel {

/// All blocks, by distance to their member, and the call that fills them.
struct GatherExchange::Gathered {
  std::vector<detail::KeyValues> blocks;
  detail::Flight flight;
};

GatherExchange::GatherExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans)
    : hdp_(std::move(hdp)), ranks_(std::move(ranks)), spans_(std::move(spans)) {
  index_ = detail::member_index(hdp_, ranks_, "parallel.gather_exchange");
}

GatherExchange::Gathered GatherExchange::gather(const at::Tensor& k, const at::Tensor& v,
                                                const model::SequenceBatch& batch) {
  Gathered result;
  for (int step = 0; step < degree(); ++step) {
    const std::int64_t rows =
        step == 0 ? k.size(0) : detail::member_rows(batch, degree(), member(step));
    result.blocks.push_back(detail::key_values_in(
        at::empty({detail::key_value_elements(rows, k, v)}, k.options()), rows, k, v));
  }
  result.blocks[0].k.copy_(k);
  result.blocks[0].v.copy_(v);
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  for (int step = 1; step < degree(); ++step) {
    const int to = ranks_[static_cast<std::size_t>((index_ + step) % degree())];
    const int from = ranks_[static_cast<std::size_t>(member(step))];
    sends.push_back({.peer = to, .tensor = &result.blocks[0].both});
    receives.push_back(
        {.peer = from, .tensor = &result.blocks[static_cast<std::size_t>(step)].both});
  }
  if (degree() > 1) result.flight = detail::post(hdp_, sends, receives);
  return result;
}

model::AttentionOutput GatherExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v,
                                               const model::SequenceBatch& batch,
                                               const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  auto out = at::zeros({q.size(0), q.size(1), v.size(2)}, statistics);
  auto lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);
  Gathered all = gather(k, v, batch);
  for (int step = 0; step < degree(); ++step) {
    if (step == 1) detail::finish(all.flight, spans_);
    const detail::KeyValues& block = all.blocks[static_cast<std::size_t>(step)];
    const auto pairs = detail::blocks_against(batch, degree(), member(step), options.window);
    model::attention_forward_(out, lse, q, block.k, block.v, pairs, options);
  }
  return {.out = out.to(q.scalar_type()), .lse = lse};
}

model::AttentionGradients GatherExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                   const at::Tensor& k, const at::Tensor& v,
                                                   const model::AttentionOutput& forward,
                                                   const model::SequenceBatch& batch,
                                                   const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  const auto delta = model::attention_delta(dout, forward.out);
  auto dq = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  Gathered all = gather(k, v, batch);
  std::vector<detail::KeyValues> gradients;
  for (int step = 0; step < degree(); ++step) {
    if (step == 1) detail::finish(all.flight, spans_);
    detail::KeyValues& block = all.blocks[static_cast<std::size_t>(step)];
    auto gradient =
        detail::key_values_in(at::zeros(block.both.sizes(), statistics), block.k.size(0), k, v);
    const auto pairs = detail::blocks_against(batch, degree(), member(step), options.window);
    model::attention_backward_(dq, gradient.k, gradient.v, dout, q, block.k, block.v, forward.lse,
                               delta, pairs, options);
    if (step > 0) block = {};
    gradients.push_back(std::move(gradient));
  }
  detail::KeyValues& own = gradients[0];
  if (degree() > 1) {
    std::vector<at::Tensor> partial(gradients.size());
    std::vector<comm::Transfer> sends;
    std::vector<comm::Transfer> receives;
    for (int step = 1; step < degree(); ++step) {
      const auto at = static_cast<std::size_t>(step);
      partial[at] = at::empty(own.both.sizes(), statistics);
      sends.push_back(
          {.peer = ranks_[static_cast<std::size_t>(member(step))], .tensor = &gradients[at].both});
      receives.push_back({.peer = ranks_[static_cast<std::size_t>((index_ + step) % degree())],
                          .tensor = &partial[at]});
    }
    detail::Flight flight = detail::post(hdp_, sends, receives);
    detail::finish(flight, spans_);
    for (int step = 1; step < degree(); ++step)
      own.both.add_(partial[static_cast<std::size_t>(step)]);
  }
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = own.k.to(type), .dv = own.v.to(type)};
}

}  // namespace meshloom::parallel
