#include "meshloom/parallel/ulysses_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/attention_kernel.h"
#include "parallel/internal/head_group.h"
#include "parallel/internal/ring_engine.h"

namespace meshloom::parallel {
namespace {

constexpr const char* kWhere = "parallel.ulysses_exchange";

/// Every `group`-th rank from `first` on.
std::vector<int> ring_of(const std::vector<int>& ranks, int group, int first) {
  std::vector<int> ring;
  for (std::size_t i = static_cast<std::size_t>(first); i < ranks.size();
       i += static_cast<std::size_t>(group)) {
    ring.push_back(ranks[i]);
  }
  return ring;
}

/// A statistic of every token and head, [heads, T], as columns of width one.
at::Tensor as_columns(const at::Tensor& sums) { return sums.t().unsqueeze(2); }

}  // namespace

class UlyssesExchange::Impl {
 public:
  Impl(comm::Communicator hdp, const std::vector<int>& ranks, int group, int index, SpanSink spans,
       std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions exchange)
      : hdp_(std::move(hdp)),
        degree_(static_cast<int>(ranks.size())),
        group_(group),
        index_(index / group),
        spans_(std::move(spans)),
        buffers_(std::move(buffers)),
        exchange_(exchange),
        heads_({ranks.begin() + index_ * group, ranks.begin() + (index_ + 1) * group},
               index % group, buffers_),
        ring_(hdp_, ring_of(ranks, group, index % group), index_, spans_, buffers_, exchange) {}

  /// What arrived for the own heads, document by document.
  struct Gathered {
    std::vector<at::Tensor> queries;  ///< as sent, [T, own heads, D]
    at::Tensor k, v;                  ///< [T, own K/V heads, D]
    std::vector<at::Tensor> sums;     ///< [own heads, T]
  };

  /// @param queries  of the dtype of k and v @param sums  [heads, T] each
  Gathered gather(const std::vector<at::Tensor>& queries, const at::Tensor& k, const at::Tensor& v,
                  const std::vector<at::Tensor>& sums, const model::SequenceBatch& batch) {
    const detail::GroupTokens& tokens = group_tokens(batch, k.device());
    const auto shares = heads_.shares(queries[0].size(1), k.size(1));
    const plan::HeadShare& own = shares[static_cast<std::size_t>(heads_.part())];
    const at::ScalarType type = k.scalar_type();
    const at::ScalarType wire = detail::wire_type(k, exchange_);
    detail::HeadColumns columns{.by_query = queries, .by_key_value = {}};
    const detail::HeadColumns keys{.by_query = {}, .by_key_value = {k, v}};
    if (wire == type) columns.by_key_value = keys.by_key_value;
    detail::Parcel parcel;
    at::Tensor all = heads_.to_heads(parcel, columns, shares, tokens, type, detail::kHeadsSent,
                                     detail::kHeadsReceived);
    at::Tensor all_keys;
    if (wire != type) {
      all_keys = heads_.to_heads(parcel, keys, shares, tokens, wire, detail::kWireSent,
                                 detail::kWireReceived);
    }
    at::Tensor all_sums;
    if (!sums.empty()) {
      detail::HeadColumns statistics;
      for (const at::Tensor& x : sums) statistics.by_query.push_back(as_columns(x));
      all_sums = heads_.to_heads(parcel, statistics, shares, tokens, sums[0].scalar_type(),
                                 detail::kSumsSent, detail::kSumsReceived);
    }
    parcel.post(hdp_);
    parcel.finish(spans_);

    all = heads_.ordered(all, tokens.by_document, detail::kHeadsSorted);
    Gathered result;
    std::int64_t column = 0;
    for (std::size_t i = 0; i < queries.size(); ++i, column += own.q()) {
      result.queries.push_back(all.narrow(1, column, own.q()));
    }
    if (wire == type) {
      all_keys = all.narrow(1, column, 2 * own.kv());
    } else {
      const at::Tensor sorted = heads_.ordered(all_keys, tokens.by_document, detail::kWireSorted);
      all_keys = buffers_->take(detail::kWireWide, sorted.sizes(), k.options()).copy_(sorted);
    }
    result.k = all_keys.narrow(1, 0, own.kv());
    result.v = all_keys.narrow(1, own.kv(), own.kv());
    if (!sums.empty()) {
      // Kernels want each head's statistics in one piece.
      const at::Tensor sorted = heads_.ordered(all_sums, tokens.by_document, detail::kSumsSorted);
      const at::Tensor by_head =
          buffers_->take(detail::kResultSums, {sorted.size(1), sorted.size(0)}, sorted.options())
              .copy_(sorted.squeeze(2).t());
      for (std::size_t i = 0; i < sums.size(); ++i) {
        result.sums.push_back(by_head.narrow(0, static_cast<std::int64_t>(i) * own.q(), own.q()));
      }
    }
    return result;
  }

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) {
    const detail::GroupTokens& tokens = group_tokens(batch, q.device());
    const Gathered all = gather({q}, k, v, {}, batch);
    const auto shares = heads_.shares(q.size(1), k.size(1));
    const plan::HeadShare& own = shares[static_cast<std::size_t>(heads_.part())];
    const std::int64_t rows = tokens.by_document.size(0);
    const std::int64_t dim = q.size(2);
    const auto statistics = q.options().dtype(detail::statistics_type(q));
    at::Tensor out = buffers_->take(detail::kAccumulator, {rows, own.q(), dim}, statistics).zero_();
    at::Tensor lse = buffers_->take(detail::kAccumulatorSums, {own.q(), rows}, statistics)
                         .fill_(-std::numeric_limits<double>::infinity());
    if (own.q() > 0) {
      ring_.forward_(out, lse, all.queries[0], all.k, all.v, tokens.batch, options,
                     runs(own, q, k));
    }
    if (out.scalar_type() != q.scalar_type()) {
      out = buffers_->take(detail::kResultCast, out.sizes(), q.options()).copy_(out);
    }
    detail::Parcel parcel;
    const auto outputs =
        heads_.to_tokens(parcel, heads_.ordered(out, tokens.by_arrival, detail::kResultSorted), 1,
                         0, shares, tokens, detail::kResultReceived);
    const auto sums = heads_.to_tokens(
        parcel, heads_.ordered(as_columns(lse), tokens.by_arrival, detail::kSumsSorted), 1, 0,
        shares, tokens, detail::kResultSumsReceived);
    parcel.post(hdp_);
    parcel.finish(spans_);
    model::AttentionOutput result{.out = at::empty(q.sizes(), q.options()),
                                  .lse = at::empty({q.size(1), q.size(0)}, statistics)};
    for (std::size_t m = 0; m < shares.size(); ++m) {
      result.out.narrow(1, shares[m].q_begin, shares[m].q()).copy_(outputs[m]);
      result.lse.narrow(0, shares[m].q_begin, shares[m].q()).copy_(sums[m].squeeze(2).t());
    }
    return result;
  }

  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) {
    const detail::GroupTokens& tokens = group_tokens(batch, q.device());
    const auto delta = model::attention_delta(dout, forward.out);
    const Gathered all = gather({q, dout}, k, v, {forward.lse, delta}, batch);
    const auto shares = heads_.shares(q.size(1), k.size(1));
    const plan::HeadShare& own = shares[static_cast<std::size_t>(heads_.part())];
    const std::int64_t rows = tokens.by_document.size(0);
    const std::int64_t dim = q.size(2);
    const auto statistics = q.options().dtype(detail::statistics_type(q));
    const at::Tensor gradients =
        buffers_->take(detail::kAccumulator, {rows, own.q() + 2 * own.kv(), dim}, statistics)
            .zero_();
    at::Tensor dq = gradients.narrow(1, 0, own.q());
    at::Tensor dk = gradients.narrow(1, own.q(), own.kv());
    at::Tensor dv = gradients.narrow(1, own.q() + own.kv(), own.kv());
    if (own.q() > 0) {
      ring_.backward_(dq, dk, dv, all.queries[1], all.queries[0], all.k, all.v, all.sums[0],
                      all.sums[1], tokens.batch, options, runs(own, q, k));
    }
    detail::Parcel parcel;
    const auto parts = heads_.to_tokens(
        parcel, heads_.ordered(gradients, tokens.by_arrival, detail::kGradientsSorted), 1, 2,
        shares, tokens, detail::kGradientsReceived);
    parcel.post(hdp_);
    parcel.finish(spans_);
    model::AttentionGradients result{.dq = at::empty(q.sizes(), q.options()),
                                     .dk = at::zeros({k.size(0), k.size(1), dim}, statistics),
                                     .dv = at::zeros({k.size(0), k.size(1), dim}, statistics)};
    for (std::size_t m = 0; m < shares.size(); ++m) {
      const plan::HeadShare& share = shares[m];
      result.dq.narrow(1, share.q_begin, share.q()).copy_(parts[m].narrow(1, 0, share.q()));
      result.dk.narrow(1, share.kv_begin, share.kv())
          .add_(parts[m].narrow(1, share.q(), share.kv()));
      result.dv.narrow(1, share.kv_begin, share.kv())
          .add_(parts[m].narrow(1, share.q() + share.kv(), share.kv()));
    }
    result.dk = result.dk.to(k.scalar_type());
    result.dv = result.dv.to(k.scalar_type());
    return result;
  }

 private:
  static std::vector<detail::HeadRun> runs(const plan::HeadShare& own, const at::Tensor& q,
                                           const at::Tensor& k) {
    return detail::head_runs(own.q_begin, own.q_end, q.size(1) / k.size(1));
  }
  const detail::GroupTokens& group_tokens(const model::SequenceBatch& batch,
                                          const at::Device& device) {
    if (!tokens_) tokens_ = detail::group_tokens(batch, degree_, group_, index_, device);
    return *tokens_;
  }

  comm::Communicator hdp_;
  int degree_;
  int group_;
  int index_;  ///< of the own head group
  SpanSink spans_;
  std::shared_ptr<ExchangeBuffers> buffers_;
  ExchangeOptions exchange_;
  detail::HeadGroup heads_;
  detail::RingEngine ring_;
  std::optional<detail::GroupTokens> tokens_;  ///< of the micro-batch; made by the first call
};

UlyssesExchange::UlyssesExchange(comm::Communicator hdp, std::vector<int> ranks, int group,
                                 SpanSink spans, std::shared_ptr<ExchangeBuffers> buffers,
                                 ExchangeOptions options) {
  const int index = detail::member_index(hdp, ranks, kWhere);
  MESHLOOM_CHECK(group >= 1 && std::ssize(ranks) % group == 0, kWhere,
                 fmt::format("head groups of {} members, expected a divisor of {} ranks", group,
                             ranks.size()));
  if (!buffers) buffers = std::make_shared<ExchangeBuffers>();
  impl_ = std::make_unique<Impl>(std::move(hdp), ranks, group, index, std::move(spans),
                                 std::move(buffers), options);
}

UlyssesExchange::~UlyssesExchange() = default;

model::AttentionOutput UlyssesExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v,
                                                const model::SequenceBatch& batch,
                                                const model::AttentionOptions& options) {
  return impl_->forward(q, k, v, batch, options);
}

model::AttentionGradients UlyssesExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                    const at::Tensor& k, const at::Tensor& v,
                                                    const model::AttentionOutput& forward,
                                                    const model::SequenceBatch& batch,
                                                    const model::AttentionOptions& options) {
  return impl_->backward(dout, q, k, v, forward, batch, options);
}

}  // namespace meshloom::parallel
