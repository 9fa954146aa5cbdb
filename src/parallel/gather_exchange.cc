#include "meshloom/parallel/gather_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel {

/// All blocks [2, rows, Hkv, D], by distance to their member, and the call that fills them.
struct GatherExchange::Gathered {
  std::vector<at::Tensor> blocks;
  detail::Flight flight;
};

GatherExchange::GatherExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans)
    : hdp_(std::move(hdp)), ranks_(std::move(ranks)), spans_(std::move(spans)) {
  index_ = detail::member_index(hdp_, ranks_, "parallel.gather_exchange");
}

GatherExchange::Gathered GatherExchange::gather(const at::Tensor& k, const at::Tensor& v,
                                                const model::SequenceBatch& batch) {
  Gathered result;
  result.blocks.push_back(at::stack({k, v}));
  for (int step = 1; step < degree(); ++step) {
    result.blocks.push_back(
        at::empty({2, detail::member_rows(batch, degree(), member(step)), k.size(1), k.size(2)},
                  k.options()));
  }
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  for (int step = 1; step < degree(); ++step) {
    const int to = ranks_[static_cast<std::size_t>((index_ + step) % degree())];
    const int from = ranks_[static_cast<std::size_t>(member(step))];
    sends.push_back({.peer = to, .tensor = &result.blocks[0]});
    receives.push_back({.peer = from, .tensor = &result.blocks[static_cast<std::size_t>(step)]});
  }
  if (degree() > 1) result.flight = detail::post(hdp_, sends, receives);
  return result;
}

model::AttentionOutput GatherExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v,
                                               const model::SequenceBatch& batch,
                                               const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  auto out = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  auto lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);
  Gathered all = gather(k, v, batch);
  for (int step = 0; step < degree(); ++step) {
    if (step == 1) detail::finish(all.flight, spans_);
    const at::Tensor& block = all.blocks[static_cast<std::size_t>(step)];
    const auto pairs = detail::blocks_against(batch, degree(), member(step), options.window);
    model::attention_forward_(out, lse, q, block.select(0, 0), block.select(0, 1), pairs, options);
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
  std::vector<at::Tensor> gradients;
  for (int step = 0; step < degree(); ++step) {
    if (step == 1) detail::finish(all.flight, spans_);
    at::Tensor& block = all.blocks[static_cast<std::size_t>(step)];
    auto gradient = at::zeros(block.sizes(), statistics);
    auto dk = gradient.select(0, 0);
    auto dv = gradient.select(0, 1);
    const auto pairs = detail::blocks_against(batch, degree(), member(step), options.window);
    model::attention_backward_(dq, dk, dv, dout, q, block.select(0, 0), block.select(0, 1),
                               forward.lse, delta, pairs, options);
    if (step > 0) block = at::Tensor();
    gradients.push_back(std::move(gradient));
  }
  at::Tensor& own = gradients[0];
  if (degree() > 1) {
    std::vector<at::Tensor> partial(gradients.size());
    std::vector<comm::Transfer> sends;
    std::vector<comm::Transfer> receives;
    for (int step = 1; step < degree(); ++step) {
      const auto at = static_cast<std::size_t>(step);
      partial[at] = at::empty(own.sizes(), statistics);
      sends.push_back(
          {.peer = ranks_[static_cast<std::size_t>(member(step))], .tensor = &gradients[at]});
      receives.push_back({.peer = ranks_[static_cast<std::size_t>((index_ + step) % degree())],
                          .tensor = &partial[at]});
    }
    detail::Flight flight = detail::post(hdp_, sends, receives);
    detail::finish(flight, spans_);
    for (int step = 1; step < degree(); ++step) own.add_(partial[static_cast<std::size_t>(step)]);
  }
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = own.select(0, 0).to(type), .dv = own.select(0, 1).to(type)};
}

}  // namespace meshloom::parallel
