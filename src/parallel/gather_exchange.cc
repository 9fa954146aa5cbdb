#include "meshloom/parallel/gather_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/ring_engine.h"

namespace meshloom::parallel {

class GatherExchange::Impl {
 public:
  Impl(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans,
       std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions options)
      : hdp_(std::move(hdp)),
        ranks_(std::move(ranks)),
        index_(detail::member_index(hdp_, ranks_, "parallel.gather_exchange")),
        spans_(std::move(spans)),
        buffers_(buffers ? std::move(buffers) : std::make_shared<ExchangeBuffers>()),
        options_(options),
        routes_(degree(), index_, false) {}

  [[nodiscard]] int degree() const { return static_cast<int>(ranks_.size()); }
  const detail::RoutedSteps& routed(const model::SequenceBatch& batch, std::int64_t window,
                                    const at::Device& device) {
    return routes_.of(batch, window, device);
  }
  void finish(detail::Parcel& parcel) const { parcel.finish(spans_); }

  /// Posts the gather. @returns all blocks, [rows, 2, Hkv, D] of step 1, then of step 2, ...
  at::Tensor gather(detail::Parcel& parcel, const detail::RoutedSteps& routed, const at::Tensor& k,
                    const at::Tensor& v) {
    const auto wire = k.options().dtype(detail::wire_type(k, options_));
    std::int64_t to_send = 0;
    std::int64_t to_receive = 0;
    for (int step = 1; step < degree(); ++step) {
      to_send += routed.direct[at(step)].rows();
      to_receive += routed.route.steps[at(step)].rows;
    }
    at::Tensor sent = buffers_->take(detail::kDirect, {to_send, 2, k.size(1), k.size(2)}, wire);
    at::Tensor blocks = buffers_->take(detail::kHeldA, {to_receive, 2, k.size(1), k.size(2)}, wire);
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (int step = 1; step < degree(); ++step) {
      const detail::RowMap& own = routed.direct[at(step)];
      at::Tensor packed = sent.narrow(0, from, own.rows());
      own.gather(packed.select(1, 0), k);
      own.gather(packed.select(1, 1), v);
      parcel.send(rank_at(step), packed);
      from += own.rows();
      const std::int64_t rows = routed.route.steps[at(step)].rows;
      parcel.receive(rank_at(-step), blocks.narrow(0, to, rows));
      to += rows;
    }
    parcel.post(hdp_);
    return blocks;
  }

  /// Keys and values in the dtype of computation.
  at::Tensor computable(const at::Tensor& blocks, const at::Tensor& k) {
    if (blocks.scalar_type() == k.scalar_type()) return blocks;
    return buffers_->take(detail::kWide, blocks.sizes(), k.options()).copy_(blocks);
  }

  at::Tensor gradients(const at::Tensor& blocks, const at::TensorOptions& options) {
    return buffers_->take(detail::kGradientA, blocks.sizes(), options).zero_();
  }

  /// Posts every gradient to the owner of its rows. @returns where others' of the own rows arrive.
  at::Tensor send_home(detail::Parcel& parcel, const detail::RoutedSteps& routed,
                       const at::Tensor& gradients) {
    std::int64_t all = 0;
    for (int step = 1; step < degree(); ++step) all += routed.returned[at(step)].rows();
    at::Tensor returned = buffers_->take(
        detail::kReturned, {all, 2, gradients.size(2), gradients.size(3)}, gradients.options());
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (int step = 1; step < degree(); ++step) {
      const std::int64_t rows = routed.route.steps[at(step)].rows;
      parcel.send(rank_at(-step), gradients.narrow(0, from, rows));
      from += rows;
      const std::int64_t own = routed.returned[at(step)].rows();
      parcel.receive(rank_at(step), returned.narrow(0, to, own));
      to += own;
    }
    parcel.post(hdp_);
    return returned;
  }

  void add_returned(const detail::RoutedSteps& routed, const at::Tensor& returned, at::Tensor& dk,
                    at::Tensor& dv) const {
    std::int64_t to = 0;
    for (int step = 1; step < degree(); ++step) {
      const detail::RowMap& own = routed.returned[at(step)];
      const at::Tensor part = returned.narrow(0, to, own.rows());
      own.add(dk, part.select(1, 0));
      own.add(dv, part.select(1, 1));
      to += own.rows();
    }
  }

 private:
  static std::size_t at(int step) { return static_cast<std::size_t>(step); }
  [[nodiscard]] int rank_at(int distance) const {
    return ranks_[static_cast<std::size_t>((index_ + distance + degree()) % degree())];
  }

  comm::Communicator hdp_;
  std::vector<int> ranks_;
  int index_;
  SpanSink spans_;
  std::shared_ptr<ExchangeBuffers> buffers_;
  ExchangeOptions options_;
  detail::RoutedBatch routes_;
};

GatherExchange::GatherExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans,
                               std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions options)
    : impl_(std::make_unique<Impl>(std::move(hdp), std::move(ranks), std::move(spans),
                                   std::move(buffers), options)) {}

GatherExchange::~GatherExchange() = default;

model::AttentionOutput GatherExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v,
                                               const model::SequenceBatch& batch,
                                               const model::AttentionOptions& options) {
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  auto out = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  auto lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);
  const auto runs = detail::head_runs(0, q.size(1), q.size(1) / k.size(1));
  const detail::RoutedSteps& routed = impl_->routed(batch, options.window, q.device());
  detail::Parcel parcel;
  at::Tensor blocks = impl_->gather(parcel, routed, k, v);
  detail::attend_(out, lse, q, k, v, routed.blocks[0], options, runs);
  impl_->finish(parcel);
  blocks = impl_->computable(blocks, k);
  std::int64_t row = 0;
  for (std::size_t step = 1; step < routed.route.steps.size(); ++step) {
    const std::int64_t rows = routed.route.steps[step].rows;
    const at::Tensor block = blocks.narrow(0, row, rows);
    detail::attend_(out, lse, q, block.select(1, 0), block.select(1, 1), routed.blocks[step],
                    options, runs);
    row += rows;
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
  const auto runs = detail::head_runs(0, q.size(1), q.size(1) / k.size(1));
  auto dq = at::zeros({q.size(0), q.size(1), q.size(2)}, statistics);
  auto dk = at::zeros({k.size(0), k.size(1), k.size(2)}, statistics);
  auto dv = at::zeros({k.size(0), k.size(1), k.size(2)}, statistics);
  const detail::RoutedSteps& routed = impl_->routed(batch, options.window, q.device());
  detail::Parcel parcel;
  at::Tensor blocks = impl_->gather(parcel, routed, k, v);
  detail::attend_backward_(dq, dk, dv, dout, q, k, v, forward.lse, delta, routed.own_first, options,
                           runs);
  impl_->finish(parcel);
  blocks = impl_->computable(blocks, k);
  const at::Tensor gradients = impl_->gradients(blocks, statistics);
  std::int64_t row = 0;
  for (std::size_t step = 1; step < routed.route.steps.size(); ++step) {
    const std::int64_t rows = routed.route.steps[step].rows;
    const at::Tensor block = blocks.narrow(0, row, rows);
    const at::Tensor gradient = gradients.narrow(0, row, rows);
    at::Tensor dk_block = gradient.select(1, 0);
    at::Tensor dv_block = gradient.select(1, 1);
    detail::attend_backward_(dq, dk_block, dv_block, dout, q, block.select(1, 0),
                             block.select(1, 1), forward.lse, delta, routed.blocks[step], options,
                             runs);
    row += rows;
  }
  detail::Parcel home;
  const at::Tensor returned = impl_->send_home(home, routed, gradients);
  detail::attend_backward_(dq, dk, dv, dout, q, k, v, forward.lse, delta, routed.own_last, options,
                           runs);
  impl_->finish(home);
  impl_->add_returned(routed, returned, dk, dv);
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = dk.to(type), .dv = dv.to(type)};
}

}  // namespace meshloom::parallel
