#include "meshloom/parallel/gather_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/ring_engine.h"

namespace meshloom::parallel {
namespace {

using model::KeysAndValues;

/// Keys and values as they are: [rows, 2, Hkv, D] on their way.
class WholeKeys {
 public:
  WholeKeys(const at::Tensor& k, const at::Tensor& v) : own_{k, v} {}

  /// Of the dtype and device of what travels.
  [[nodiscard]] const at::Tensor& like() const { return own_.k; }
  [[nodiscard]] std::vector<std::int64_t> shape(std::int64_t rows) const {
    return {rows, 2, own_.k.size(1), own_.k.size(2)};
  }
  [[nodiscard]] const KeysAndValues& own() const { return own_; }
  void pack(const detail::RowMap& map, const at::Tensor& to) const {
    map.gather(to.select(1, 0), own_.k);
    map.gather(to.select(1, 1), own_.v);
  }
  [[nodiscard]] static KeysAndValues of(const at::Tensor& block) {
    return {block.select(1, 0), block.select(1, 1)};
  }

 private:
  KeysAndValues own_;
};

/// Their gradients, of own rows and of blocks, which are accumulated where they are sent from.
class WholeGradients {
 public:
  WholeGradients(const WholeKeys& keys, const at::TensorOptions& statistics)
      : dk_(at::zeros(keys.own().k.sizes(), statistics)),
        dv_(at::zeros(keys.own().v.sizes(), statistics)) {}

  void own(const auto& attend) { attend(dk_, dv_); }
  static void block(const at::Tensor& /*rows*/, const KeysAndValues& /*keys*/,
                    const at::Tensor& gradient, const auto& attend) {
    at::Tensor dk = gradient.select(1, 0);
    at::Tensor dv = gradient.select(1, 1);
    attend(dk, dv);
  }
  void end_own() {}
  void add(const detail::RowMap& map, const at::Tensor& from) {
    map.add(dk_, from.select(1, 0));
    map.add(dv_, from.select(1, 1));
  }
  [[nodiscard]] const at::Tensor& dk() const { return dk_; }
  [[nodiscard]] const at::Tensor& dv() const { return dv_; }

 private:
  at::Tensor dk_;
  at::Tensor dv_;
};

/// What keys and values are made from: [rows, n] on their way.
class LatentRows {
 public:
  explicit LatentRows(const model::LatentKeys& keys)
      : keys_(keys), own_(keys.expand(keys.rows())) {}

  [[nodiscard]] const at::Tensor& like() const { return keys_.rows(); }
  [[nodiscard]] std::vector<std::int64_t> shape(std::int64_t rows) const {
    return {rows, keys_.rows().size(1)};
  }
  [[nodiscard]] const KeysAndValues& own() const { return own_; }
  void pack(const detail::RowMap& map, const at::Tensor& to) const { map.gather(to, keys_.rows()); }
  [[nodiscard]] KeysAndValues of(const at::Tensor& block) const { return keys_.expand(block); }

 private:
  const model::LatentKeys& keys_;
  KeysAndValues own_;
};

class LatentRowGradients {
 public:
  LatentRowGradients(model::LatentKeys& keys, const LatentRows& rows,
                     const at::TensorOptions& statistics)
      : keys_(keys),
        dk_(at::zeros(rows.own().k.sizes(), statistics)),
        dv_(at::zeros(rows.own().v.sizes(), statistics)) {}

  void own(const auto& attend) { attend(dk_, dv_); }
  void block(const at::Tensor& rows, const KeysAndValues& keys, const at::Tensor& gradient,
             const auto& attend) {
    at::Tensor dk = at::zeros(keys.k.sizes(), dk_.options());
    at::Tensor dv = at::zeros(keys.v.sizes(), dk_.options());
    attend(dk, dv);
    // The buffers are used again before a deferred weight gradient reads its operand.
    gradient.copy_(keys_.contract(rows.clone(), dk, dv));
  }
  void end_own() {
    drows_ = keys_.contract(keys_.rows(), dk_, dv_).to(dk_.scalar_type());
    dk_.reset();
    dv_.reset();
  }
  void add(const detail::RowMap& map, const at::Tensor& from) { map.add(drows_, from); }
  [[nodiscard]] const at::Tensor& drows() const { return drows_; }

 private:
  model::LatentKeys& keys_;
  at::Tensor dk_;
  at::Tensor dv_;
  at::Tensor drows_;
};

at::TensorOptions statistics_of(const at::Tensor& q) {
  return q.options().dtype(detail::statistics_type(q));
}

}  // namespace

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

  template <typename Keys>
  model::AttentionOutput forward(const at::Tensor& q, const Keys& keys,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) {
    const auto statistics = statistics_of(q);
    const KeysAndValues& own = keys.own();
    auto out = at::zeros({q.size(0), q.size(1), own.v.size(2)}, statistics);
    auto lse =
        at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), statistics);
    const auto runs = detail::head_runs(0, q.size(1), q.size(1) / own.k.size(1));
    const detail::RoutedSteps& routed = routes_.of(batch, options.window, q.device());
    detail::Parcel parcel;
    at::Tensor blocks = gather(parcel, routed, keys);
    detail::attend_(out, lse, q, own.k, own.v, routed.blocks[0], options, runs);
    parcel.finish(spans_);
    blocks = computable(blocks, keys.like());
    std::int64_t row = 0;
    for (std::size_t step = 1; step < routed.route.steps.size(); ++step) {
      const std::int64_t rows = routed.route.steps[step].rows;
      const KeysAndValues block = keys.of(blocks.narrow(0, row, rows));
      detail::attend_(out, lse, q, block.k, block.v, routed.blocks[step], options, runs);
      row += rows;
    }
    return {.out = out.to(q.scalar_type()), .lse = lse};
  }

  /// @param gradients  accumulates those of own rows, and of blocks where they are sent from
  /// @returns dq, in the dtype of sums
  template <typename Keys, typename Gradients>
  at::Tensor backward(const at::Tensor& dout, const at::Tensor& q, const Keys& keys,
                      Gradients& gradients, const model::AttentionOutput& forward,
                      const model::SequenceBatch& batch, const model::AttentionOptions& options) {
    const auto statistics = statistics_of(q);
    const KeysAndValues& own = keys.own();
    const auto delta = model::attention_delta(dout, forward.out);
    const auto runs = detail::head_runs(0, q.size(1), q.size(1) / own.k.size(1));
    auto dq = at::zeros(q.sizes(), statistics);
    const auto attend = [&](const KeysAndValues& held,
                            std::span<const model::AttentionBlock> blocks) {
      return [&, blocks](at::Tensor& dk, at::Tensor& dv) {
        detail::attend_backward_(dq, dk, dv, dout, q, held.k, held.v, forward.lse, delta, blocks,
                                 options, runs);
      };
    };
    const detail::RoutedSteps& routed = routes_.of(batch, options.window, q.device());
    detail::Parcel parcel;
    at::Tensor blocks = gather(parcel, routed, keys);
    gradients.own(attend(own, routed.own_first));
    parcel.finish(spans_);
    blocks = computable(blocks, keys.like());
    const at::Tensor sent = buffers_->take(detail::kGradientA, blocks.sizes(), statistics).zero_();
    std::int64_t row = 0;
    for (std::size_t step = 1; step < routed.route.steps.size(); ++step) {
      const std::int64_t rows = routed.route.steps[step].rows;
      const at::Tensor block = blocks.narrow(0, row, rows);
      const KeysAndValues held = keys.of(block);
      gradients.block(block, held, sent.narrow(0, row, rows), attend(held, routed.blocks[step]));
      row += rows;
    }
    detail::Parcel home;
    const at::Tensor returned = send_home(home, routed, sent);
    gradients.own(attend(own, routed.own_last));
    gradients.end_own();
    home.finish(spans_);
    std::int64_t to = 0;
    for (int step = 1; step < degree(); ++step) {
      const detail::RowMap& map = routed.returned[at(step)];
      gradients.add(map, returned.narrow(0, to, map.rows()));
      to += map.rows();
    }
    return dq;
  }

 private:
  static std::size_t at(int step) { return static_cast<std::size_t>(step); }
  [[nodiscard]] int degree() const { return static_cast<int>(ranks_.size()); }
  [[nodiscard]] int rank_at(int distance) const {
    return ranks_[static_cast<std::size_t>((index_ + distance + degree()) % degree())];
  }

  /// Posts the gather. @returns all blocks: of step 1, then of step 2, ...
  template <typename Keys>
  at::Tensor gather(detail::Parcel& parcel, const detail::RoutedSteps& routed, const Keys& keys) {
    const at::Tensor& like = keys.like();
    const auto wire = like.options().dtype(detail::wire_type(like, options_));
    std::int64_t to_send = 0;
    std::int64_t to_receive = 0;
    for (int step = 1; step < degree(); ++step) {
      to_send += routed.direct[at(step)].rows();
      to_receive += routed.route.steps[at(step)].rows;
    }
    at::Tensor sent = buffers_->take(detail::kDirect, keys.shape(to_send), wire);
    at::Tensor blocks = buffers_->take(detail::kHeldA, keys.shape(to_receive), wire);
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (int step = 1; step < degree(); ++step) {
      const detail::RowMap& own = routed.direct[at(step)];
      const at::Tensor packed = sent.narrow(0, from, own.rows());
      keys.pack(own, packed);
      parcel.send(rank_at(step), packed);
      from += own.rows();
      const std::int64_t rows = routed.route.steps[at(step)].rows;
      parcel.receive(rank_at(-step), blocks.narrow(0, to, rows));
      to += rows;
    }
    parcel.post(hdp_);
    return blocks;
  }

  /// What arrived, in the dtype of computation.
  at::Tensor computable(const at::Tensor& blocks, const at::Tensor& like) {
    if (blocks.scalar_type() == like.scalar_type()) return blocks;
    return buffers_->take(detail::kWide, blocks.sizes(), like.options()).copy_(blocks);
  }

  /// Posts every gradient to the owner of its rows. @returns where others' of the own rows arrive.
  at::Tensor send_home(detail::Parcel& parcel, const detail::RoutedSteps& routed,
                       const at::Tensor& gradients) {
    std::vector<std::int64_t> shape = gradients.sizes().vec();
    shape[0] = 0;
    for (int step = 1; step < degree(); ++step) shape[0] += routed.returned[at(step)].rows();
    at::Tensor returned = buffers_->take(detail::kReturned, shape, gradients.options());
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
  return impl_->forward(q, WholeKeys(k, v), batch, options);
}

model::AttentionGradients GatherExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                   const at::Tensor& k, const at::Tensor& v,
                                                   const model::AttentionOutput& forward,
                                                   const model::SequenceBatch& batch,
                                                   const model::AttentionOptions& options) {
  const WholeKeys keys(k, v);
  WholeGradients gradients(keys, statistics_of(q));
  const at::Tensor dq = impl_->backward(dout, q, keys, gradients, forward, batch, options);
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .dk = gradients.dk().to(type), .dv = gradients.dv().to(type)};
}

model::AttentionOutput GatherExchange::forward_latent(const at::Tensor& q,
                                                      const model::LatentKeys& keys,
                                                      const model::SequenceBatch& batch,
                                                      const model::AttentionOptions& options) {
  return impl_->forward(q, LatentRows(keys), batch, options);
}

model::LatentGradients GatherExchange::backward_latent(const at::Tensor& dout, const at::Tensor& q,
                                                       model::LatentKeys& keys,
                                                       const model::AttentionOutput& forward,
                                                       const model::SequenceBatch& batch,
                                                       const model::AttentionOptions& options) {
  const LatentRows rows(keys);
  LatentRowGradients gradients(keys, rows, statistics_of(q));
  const at::Tensor dq = impl_->backward(dout, q, rows, gradients, forward, batch, options);
  const auto type = q.scalar_type();
  return {.dq = dq.to(type), .drows = gradients.drows().to(type)};
}

}  // namespace meshloom::parallel
