#include "parallel/internal/ring_engine.h"

#include <array>
#include <utility>

namespace meshloom::parallel::detail {
namespace {

std::size_t alternate(Buffer first, int step) {
  return static_cast<std::size_t>(first) + static_cast<std::size_t>(step % 2);
}

/// Keys and values of some rows in one tensor.
std::array<std::int64_t, 4> block_shape(std::int64_t rows, const at::Tensor& k) {
  return {rows, 2, k.size(1), k.size(2)};
}

std::vector<RowMap> maps_of(const std::vector<std::vector<plan::RowSpan>>& spans,
                            const at::Device& device) {
  std::vector<RowMap> maps;
  for (const auto& list : spans) maps.emplace_back(list, device);
  return maps;
}

std::size_t at_step(int step) { return static_cast<std::size_t>(step); }

}  // namespace

RoutedSteps::RoutedSteps(const model::SequenceBatch& batch, int degree, int index,
                         std::int64_t window, bool relay, const at::Device& device)
    : route(plan::make_route(document_lengths(batch), degree, index, window, relay)),
      direct(maps_of(route.direct, device)),
      returned(maps_of(route.returned, device)) {
  for (const plan::RouteStep& step : route.steps) {
    blocks.push_back(blocks_against(batch, blocks.empty() ? own_runs(batch) : step.held, window));
    forward.emplace_back(step.forward, device);
    home.emplace_back(step.home, device);
  }
  for (const model::AttentionBlock& block : blocks[0]) {
    const bool diagonal = block.q_position == block.k_position;
    (diagonal && degree > 1 ? own_last : own_first).push_back(block);
  }
}

const RoutedSteps& RoutedBatch::of(const model::SequenceBatch& batch, std::int64_t window,
                                   const at::Device& device) {
  const auto found = by_window_.find(window);
  if (found != by_window_.end()) return found->second;
  return by_window_.emplace(window, RoutedSteps(batch, degree_, index_, window, relay_, device))
      .first->second;
}

RingEngine::RingEngine(comm::Communicator hdp, std::vector<int> ranks, int index, SpanSink spans,
                       std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions exchange)
    : hdp_(std::move(hdp)),
      ranks_(std::move(ranks)),
      index_(index),
      spans_(std::move(spans)),
      buffers_(std::move(buffers)),
      exchange_(exchange),
      routes_(degree(), index, true) {}

at::Tensor RingEngine::computable(const at::Tensor& held, const at::Tensor& k) {
  if (held.scalar_type() == k.scalar_type()) return held;
  return buffers_->take(kWide, held.sizes(), k.options()).copy_(held);
}

at::Tensor RingEngine::move_keys(Parcel& parcel, const RoutedSteps& routed, int step,
                                 const at::Tensor& held, const at::Tensor& k, const at::Tensor& v) {
  const auto wire = k.options().dtype(wire_type(k, exchange_));
  const RowMap& own = routed.direct[at_step(step + 1)];
  if (own.rows() > 0) {
    at::Tensor packed = buffers_->take(kDirect, block_shape(own.rows(), k), wire);
    own.gather(packed.select(1, 0), k);
    own.gather(packed.select(1, 1), v);
    parcel.send(rank_at(step + 1), packed);
  }
  if (step > 0) {
    const RowMap& passed = routed.forward[at_step(step)];
    at::Tensor block = held;
    if (passed.rows() > 0 && !passed.is_all(held.size(0))) {
      block = buffers_->take(kRelayed, block_shape(passed.rows(), k), wire);
      passed.gather(block, held);
    }
    if (passed.rows() > 0) parcel.send(rank_at(1), block);
  }
  const plan::RouteStep& next = routed.route.steps[at_step(step + 1)];
  at::Tensor incoming =
      buffers_->take(alternate(kHeldA, step + 1), block_shape(next.rows, k), wire);
  parcel.receive(rank_at(-1), incoming.narrow(0, 0, next.from_previous));
  parcel.receive(rank_at(-step - 1),
                 incoming.narrow(0, next.from_previous, next.rows - next.from_previous));
  return incoming;
}

void RingEngine::move_gradient(Parcel& parcel, const RoutedSteps& routed, int step,
                               const at::Tensor& gradient) {
  const auto part = [&](const RowMap& map, Buffer name) {
    if (map.is_all(gradient.size(0))) return gradient;
    auto shape = gradient.sizes().vec();
    shape[0] = map.rows();
    at::Tensor packed = buffers_->take(name, shape, gradient.options());
    map.gather(packed, gradient);
    return packed;
  };
  parcel.send(rank_at(1), part(routed.forward[at_step(step)], kGradientOn));
  parcel.send(rank_at(-step), part(routed.home[at_step(step)], kGradientHome));
}

void RingEngine::forward_(at::Tensor& out, at::Tensor& lse, const at::Tensor& q,
                          const at::Tensor& k, const at::Tensor& v,
                          const model::SequenceBatch& batch, const model::AttentionOptions& options,
                          std::span<const HeadRun> runs) {
  const RoutedSteps& routed = routes_.of(batch, options.window, q.device());
  at::Tensor held;
  for (int step = 0; step < degree(); ++step) {
    Parcel parcel;
    at::Tensor incoming;
    if (step + 1 < degree()) incoming = move_keys(parcel, routed, step, held, k, v);
    parcel.post(hdp_);
    const auto& blocks = routed.blocks[at_step(step)];
    if (step == 0) {
      attend_(out, lse, q, k, v, blocks, options, runs);
    } else {
      const at::Tensor block = computable(held, k);
      attend_(out, lse, q, block.select(1, 0), block.select(1, 1), blocks, options, runs);
    }
    parcel.finish(spans_);
    held = incoming;
  }
}

// Call c moves, beside the keys of step c + 1, the gradient of step c - 1, finished by then, and
// brings what earlier holders added to the gradient of step c, and own gradients from their last
// holder.
void RingEngine::backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                           const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& lse, const at::Tensor& delta,
                           const model::SequenceBatch& batch,
                           const model::AttentionOptions& options, std::span<const HeadRun> runs) {
  const RoutedSteps& routed = routes_.of(batch, options.window, q.device());
  const auto statistics = lse.options();
  at::Tensor held;
  at::Tensor finished;  // gradient of the step before
  for (int step = 0; step <= degree(); ++step) {
    if (step == 1 && degree() == 1) break;
    Parcel parcel;
    at::Tensor incoming;
    at::Tensor partial;
    at::Tensor returned;
    if (step + 1 < degree()) incoming = move_keys(parcel, routed, step, held, k, v);
    if (step > 1) {
      move_gradient(parcel, routed, step - 1, finished);
      if (step < degree()) {
        partial = buffers_->take(
            kPartial, block_shape(routed.route.steps[at_step(step)].from_previous, k), statistics);
        parcel.receive(rank_at(-1), partial);
      }
      returned = buffers_->take(
          kReturned, block_shape(routed.returned[at_step(step - 1)].rows(), k), statistics);
      parcel.receive(rank_at(step - 1), returned);
    }
    parcel.post(hdp_);
    at::Tensor gradient;
    if (step == 0) {
      attend_backward_(dq, dk, dv, dout, q, k, v, lse, delta, routed.own_first, options, runs);
    } else if (step == degree()) {
      attend_backward_(dq, dk, dv, dout, q, k, v, lse, delta, routed.own_last, options, runs);
    } else {
      gradient = buffers_->take(alternate(kGradientA, step), held.sizes(), statistics).zero_();
      const at::Tensor block = computable(held, k);
      at::Tensor dk_block = gradient.select(1, 0);
      at::Tensor dv_block = gradient.select(1, 1);
      attend_backward_(dq, dk_block, dv_block, dout, q, block.select(1, 0), block.select(1, 1), lse,
                       delta, routed.blocks[at_step(step)], options, runs);
    }
    parcel.finish(spans_);
    if (partial.defined()) gradient.narrow(0, 0, partial.size(0)).add_(partial);
    if (returned.defined()) {
      routed.returned[at_step(step - 1)].add(dk, returned.select(1, 0));
      routed.returned[at_step(step - 1)].add(dv, returned.select(1, 1));
    }
    finished = gradient;
    held = incoming;
  }
}

}  // namespace meshloom::parallel::detail
