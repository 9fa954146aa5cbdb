#include "meshloom/parallel/ring_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <limits>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel {
namespace {

using detail::Flight;
using detail::KeyValues;

/// What each reused buffer holds; pairs alternate, one in flight while the other is worked on.
enum Buffer : std::size_t { kBlocks = 0, kGradients = 2, kPartial = 4 };

std::size_t alternate(Buffer first, int step) {
  return static_cast<std::size_t>(first) + static_cast<std::size_t>(step % 2);
}

}  // namespace

const char* to_string(Span::Kind kind) {
  switch (kind) {
    case Span::Kind::kLoad:
      return "load";
    case Span::Kind::kForward:
      return "forward";
    case Span::Kind::kBackward:
      return "backward";
    case Span::Kind::kExchange:
      return "exchange";
    case Span::Kind::kWait:
      return "wait";
    case Span::Kind::kDispatch:
      return "dispatch";
    case Span::Kind::kTensor:
      return "tensor";
    case Span::Kind::kPipeline:
      return "pipeline";
    case Span::Kind::kReduce:
      return "reduce";
    case Span::Kind::kStep:
      return "step";
  }
  return "unknown";
}

at::Tensor ExchangeBuffers::take(std::size_t index, at::IntArrayRef sizes,
                                 const at::TensorOptions& options) {
  at::Tensor& buffer = buffers_.at(index);
  const std::int64_t elements = c10::multiply_integers(sizes);
  if (!buffer.defined() || buffer.numel() < elements ||
      buffer.scalar_type() != c10::typeMetaToScalarType(options.dtype()) ||
      buffer.device() != options.device()) {
    buffer = at::Tensor();  // the former one goes before its successor comes
    buffer = at::empty({elements}, options);
  }
  return buffer.narrow(0, 0, elements).view(sizes);
}

RingExchange::RingExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans,
                           std::shared_ptr<ExchangeBuffers> buffers)
    : hdp_(std::move(hdp)),
      ranks_(std::move(ranks)),
      spans_(std::move(spans)),
      buffers_(buffers ? std::move(buffers) : std::make_shared<ExchangeBuffers>()) {
  index_ = detail::member_index(hdp_, ranks_, "parallel.ring_exchange");
}

detail::KeyValues RingExchange::take(std::size_t buffer, std::int64_t rows, const at::Tensor& k,
                                     const at::Tensor& v, const at::TensorOptions& options) {
  return detail::key_values_in(
      buffers_->take(buffer, {detail::key_value_elements(rows, k, v)}, options), rows, k, v);
}

detail::KeyValues RingExchange::pack(const at::Tensor& k, const at::Tensor& v) {
  KeyValues packed = take(alternate(kBlocks, 0), k.size(0), k, v, k.options());
  packed.k.copy_(k);
  packed.v.copy_(v);
  return packed;
}

model::AttentionOutput RingExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const model::SequenceBatch& batch,
                                             const model::AttentionOptions& options) {
  const int size = degree();
  const int next = ranks_[static_cast<std::size_t>((index_ + 1) % size)];
  const int previous = ranks_[static_cast<std::size_t>((index_ + size - 1) % size)];
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  auto out = at::zeros({q.size(0), q.size(1), v.size(2)}, statistics);
  auto lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);

  KeyValues held = pack(k, v);
  for (int step = 0; step < size; ++step) {
    const int member = (index_ + size - step) % size;
    KeyValues incoming;
    Flight flight;
    if (step + 1 < size) {
      const int sender = (member + size - 1) % size;
      incoming = take(alternate(kBlocks, step + 1), detail::member_rows(batch, size, sender), k, v,
                      k.options());
      const comm::Transfer send{.peer = next, .tensor = &held.both};
      const comm::Transfer receive{.peer = previous, .tensor = &incoming.both};
      flight = detail::post(hdp_, {&send, 1}, {&receive, 1});
    }
    const auto blocks = detail::blocks_against(batch, size, member, options.window);
    model::attention_forward_(out, lse, q, held.k, held.v, blocks, options);
    if (step + 1 < size) {
      detail::finish(flight, spans_);
      held = incoming;
    }
  }
  return {.out = out.to(q.scalar_type()), .lse = lse};
}

// Step j holds the block of member index - j. In one grouped call it sends that block on, together
// with the gradient of the block of step j - 1 (finished by then), and receives the next block and
// what all earlier holders added to the gradient of the block held now. After the last step one
// more transfer brings every gradient home.
model::AttentionGradients RingExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                 const at::Tensor& k, const at::Tensor& v,
                                                 const model::AttentionOutput& forward,
                                                 const model::SequenceBatch& batch,
                                                 const model::AttentionOptions& options) {
  const int size = degree();
  const int next = ranks_[static_cast<std::size_t>((index_ + 1) % size)];
  const int previous = ranks_[static_cast<std::size_t>((index_ + size - 1) % size)];
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  const auto delta = model::attention_delta(dout, forward.out);
  auto dq = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);

  KeyValues held = pack(k, v);
  KeyValues outgoing;  // gradient of the block of the step before, for the next rank
  for (int step = 0; step < size; ++step) {
    const int member = (index_ + size - step) % size;
    KeyValues incoming;
    at::Tensor partial;
    std::vector<comm::Transfer> sends;
    std::vector<comm::Transfer> receives;
    if (step > 0) {
      partial = buffers_->take(kPartial, held.both.sizes(), statistics);
      sends.push_back({.peer = next, .tensor = &outgoing.both});
      receives.push_back({.peer = previous, .tensor = &partial});
    }
    if (step + 1 < size) {
      const int sender = (member + size - 1) % size;
      incoming = take(alternate(kBlocks, step + 1), detail::member_rows(batch, size, sender), k, v,
                      k.options());
      sends.push_back({.peer = next, .tensor = &held.both});
      receives.push_back({.peer = previous, .tensor = &incoming.both});
    }
    Flight flight;
    if (!sends.empty()) flight = detail::post(hdp_, sends, receives);

    const std::int64_t rows = held.k.size(0);
    KeyValues gradient =
        size == 1 ? detail::key_values_in(at::empty(held.both.sizes(), statistics), rows, k, v)
                  : take(alternate(kGradients, step), rows, k, v, statistics);
    gradient.both.zero_();
    const auto blocks = detail::blocks_against(batch, size, member, options.window);
    model::attention_backward_(dq, gradient.k, gradient.v, dout, q, held.k, held.v, forward.lse,
                               delta, blocks, options);
    if (!sends.empty()) detail::finish(flight, spans_);
    if (step > 0) gradient.both.add_(partial);
    outgoing = gradient;
    held = incoming;
  }
  if (size > 1) {
    const std::int64_t rows = k.size(0);
    KeyValues home = detail::key_values_in(
        at::empty({detail::key_value_elements(rows, k, v)}, statistics), rows, k, v);
    const comm::Transfer send{.peer = next, .tensor = &outgoing.both};
    const comm::Transfer receive{.peer = previous, .tensor = &home.both};
    Flight flight = detail::post(hdp_, {&send, 1}, {&receive, 1});
    detail::finish(flight, spans_);
    outgoing = home;
  }
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = outgoing.k.to(type), .dv = outgoing.v.to(type)};
}

}  // namespace meshloom::parallel
