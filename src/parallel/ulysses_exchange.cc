#include "meshloom/parallel/ulysses_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>

#include "meshloom/model/attention_kernel.h"
#include "meshloom/plan/slicing.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel {

/// Query heads [q_begin, q_end) and the K/V heads they read.
struct UlyssesExchange::Heads {
  std::int64_t q_begin = 0;
  std::int64_t q_end = 0;
  std::int64_t kv_begin = 0;
  std::int64_t kv_end = 0;
  [[nodiscard]] std::int64_t q() const { return q_end - q_begin; }
  [[nodiscard]] std::int64_t kv() const { return kv_end - kv_begin; }
};

/// All members' tokens on one rank: rows arrive member by member, attention wants them document by
/// document.
struct UlyssesExchange::WholeDocuments {
  model::SequenceBatch batch;      ///< whole documents; no token ids
  std::vector<std::int64_t> rows;  ///< of each member
  at::Tensor by_document;          ///< int64 [T]: arrival row of each row of the batch
  at::Tensor by_arrival;           ///< int64 [T]: its inverse
};

namespace {

/// Some heads of one tensor [T, heads, size], a part of each row of a message.
struct HeadRange {
  const at::Tensor& x;
  std::int64_t begin;
  std::int64_t count;
  [[nodiscard]] std::int64_t width() const { return count * x.size(2); }
};

/// The message [T, sum of widths].
at::Tensor packed(std::initializer_list<HeadRange> ranges) {
  std::vector<at::Tensor> parts;
  for (const HeadRange& range : ranges) {
    parts.push_back(range.x.narrow(1, range.begin, range.count).flatten(1));
  }
  return at::cat(parts, 1);
}

/// Reads a message's columns one after another as heads.
class Columns {
 public:
  explicit Columns(const at::Tensor& rows) : rows_(rows) {}
  at::Tensor next(std::int64_t heads, std::int64_t size) {
    const at::Tensor part = rows_.narrow(1, at_, heads * size).view({rows_.size(0), heads, size});
    at_ += heads * size;
    return part;
  }

 private:
  const at::Tensor& rows_;
  std::int64_t at_ = 0;
};

/// Each query head's own K/V head, where the heads of a member do not make up whole groups.
at::Tensor expand(const at::Tensor& kv, const at::Tensor& head_of_query) {
  return head_of_query.defined() ? kv.index_select(1, head_of_query) : kv;
}

/// The K/V head of each query head, relative to the first; undefined where groups are whole.
at::Tensor reads(std::int64_t q_begin, std::int64_t q_end, std::int64_t kv_begin,
                 std::int64_t group, const at::Device& device) {
  if (q_begin % group == 0 && q_end % group == 0) return {};
  return at::arange(q_begin, q_end, at::TensorOptions().dtype(at::kLong))
      .floor_divide(group)
      .sub(kv_begin)
      .to(device);
}

at::Tensor fold(const at::Tensor& gradient, const at::Tensor& head_of_query,
                std::int64_t kv_heads) {
  if (!head_of_query.defined()) return gradient;
  auto folded = at::zeros({gradient.size(0), kv_heads, gradient.size(2)}, gradient.options());
  folded.index_add_(1, head_of_query, gradient);
  return folded;
}

std::vector<at::Tensor> split_rows(const at::Tensor& all, const std::vector<std::int64_t>& rows) {
  std::vector<at::Tensor> parts;
  std::int64_t begin = 0;
  for (const auto count : rows) {
    parts.push_back(all.narrow(0, begin, count).contiguous());
    begin += count;
  }
  return parts;
}

}  // namespace

UlyssesExchange::UlyssesExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans)
    : hdp_(std::move(hdp)), ranks_(std::move(ranks)), spans_(std::move(spans)) {
  index_ = detail::member_index(hdp_, ranks_, "parallel.ulysses_exchange");
}

UlyssesExchange::Heads UlyssesExchange::heads_of(int member, const at::Tensor& q,
                                                 const at::Tensor& k) const {
  const std::int64_t heads = q.size(1);
  const std::int64_t group = heads / k.size(1);
  Heads result;
  result.q_begin = member * heads / degree();
  result.q_end = (member + 1) * heads / degree();
  result.kv_begin = result.q_begin / group;
  result.kv_end = result.q() == 0 ? result.kv_begin : (result.q_end - 1) / group + 1;
  return result;
}

const UlyssesExchange::WholeDocuments& UlyssesExchange::whole_documents(
    const model::SequenceBatch& batch, const at::Device& device) {
  if (whole_) return *whole_;
  WholeDocuments whole;
  std::int64_t total = 0;
  for (const auto& document : batch.documents) {
    auto& entry = whole.batch.documents.emplace_back(document);
    entry.ranges = plan::member_ranges(document.length, 1, 0);
    total += document.length;
  }
  auto by_arrival = at::empty({total}, at::TensorOptions().dtype(at::kLong));
  auto by_document = at::empty({total}, at::TensorOptions().dtype(at::kLong));
  auto* arrival = by_arrival.mutable_data_ptr<std::int64_t>();
  auto* document_row = by_document.mutable_data_ptr<std::int64_t>();
  std::int64_t row = 0;
  for (int member = 0; member < degree(); ++member) {
    whole.rows.push_back(detail::member_rows(batch, degree(), member));
    std::int64_t first = 0;
    for (const auto& document : batch.documents) {
      for (const auto& range : plan::member_ranges(document.length, degree(), member)) {
        for (auto t = range.begin; t < range.end; ++t, ++row) {
          arrival[row] = first + t;
          document_row[first + t] = row;
        }
      }
      first += document.length;
    }
  }
  whole.by_arrival = by_arrival.to(device);
  whole.by_document = by_document.to(device);
  whole.batch.tokens = by_document;  // its size is the batch's
  whole_ = std::make_shared<const WholeDocuments>(std::move(whole));
  return *whole_;
}

void UlyssesExchange::all_to_all(const std::vector<at::Tensor>& to, std::vector<at::Tensor>& from) {
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  for (int step = 1; step < degree(); ++step) {
    const auto next = static_cast<std::size_t>((index_ + step) % degree());
    const auto previous = static_cast<std::size_t>((index_ + degree() - step) % degree());
    if (to[next].numel() > 0) sends.push_back({.peer = ranks_[next], .tensor = &to[next]});
    if (from[previous].numel() > 0) {
      receives.push_back({.peer = ranks_[previous], .tensor = &from[previous]});
    }
  }
  from[static_cast<std::size_t>(index_)] = to[static_cast<std::size_t>(index_)];
  if (sends.empty() && receives.empty()) return;
  detail::Flight flight = detail::post(hdp_, sends, receives);
  detail::finish(flight, spans_);
}

model::AttentionOutput UlyssesExchange::forward(const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v,
                                                const model::SequenceBatch& batch,
                                                const model::AttentionOptions& options) {
  const std::int64_t dim = q.size(2);
  const std::int64_t v_dim = v.size(2);
  const Heads own = heads_of(index_, q, k);
  const WholeDocuments& whole = whole_documents(batch, q.device());
  const std::int64_t width = own.q() * dim + own.kv() * (dim + v_dim);
  std::vector<at::Tensor> to;
  std::vector<at::Tensor> from;
  for (int member = 0; member < degree(); ++member) {
    const Heads heads = heads_of(member, q, k);
    to.push_back(packed({{q, heads.q_begin, heads.q()},
                         {k, heads.kv_begin, heads.kv()},
                         {v, heads.kv_begin, heads.kv()}}));
    from.push_back(at::empty({whole.rows[static_cast<std::size_t>(member)], width}, q.options()));
  }
  all_to_all(to, from);

  const auto all = at::cat(from).index_select(0, whole.by_document);
  const auto head_of_query =
      reads(own.q_begin, own.q_end, own.kv_begin, q.size(1) / k.size(1), q.device());
  model::AttentionOutput mine;
  if (own.q() > 0) {
    Columns columns(all);
    const at::Tensor queries = columns.next(own.q(), dim).contiguous();
    const at::Tensor keys = expand(columns.next(own.kv(), dim), head_of_query).contiguous();
    const at::Tensor values = expand(columns.next(own.kv(), v_dim), head_of_query).contiguous();
    mine = model::LocalAttention().forward(queries, keys, values, whole.batch, options);
  } else {
    mine.out = at::empty({all.size(0), 0, v_dim}, q.options());
    mine.lse = at::empty({0, all.size(0)}, q.options().dtype(detail::statistics_type(q)));
  }

  const auto outputs = split_rows(mine.out.index_select(0, whole.by_arrival), whole.rows);
  const auto sums =
      split_rows(mine.lse.transpose(0, 1).index_select(0, whole.by_arrival), whole.rows);
  std::vector<at::Tensor> out_from;
  std::vector<at::Tensor> lse_from;
  for (int member = 0; member < degree(); ++member) {
    const Heads heads = heads_of(member, q, k);
    out_from.push_back(at::empty({q.size(0), heads.q(), v_dim}, q.options()));
    lse_from.push_back(at::empty({q.size(0), heads.q()}, mine.lse.options()));
  }
  all_to_all(outputs, out_from);
  all_to_all(sums, lse_from);
  return {.out = at::cat(out_from, 1), .lse = at::cat(lse_from, 1).transpose(0, 1).contiguous()};
}

model::AttentionGradients UlyssesExchange::backward(const at::Tensor& dout, const at::Tensor& q,
                                                    const at::Tensor& k, const at::Tensor& v,
                                                    const model::AttentionOutput& forward,
                                                    const model::SequenceBatch& batch,
                                                    const model::AttentionOptions& options) {
  const std::int64_t dim = q.size(2);
  const std::int64_t v_dim = v.size(2);
  const Heads own = heads_of(index_, q, k);
  const WholeDocuments& whole = whole_documents(batch, q.device());
  const std::int64_t width = (own.q() + own.kv()) * (dim + v_dim);
  const auto statistics = q.options().dtype(detail::statistics_type(q));
  // log-sum-exp and delta travel as two more columns of their own tensor: they are wider than q
  const auto delta = model::attention_delta(dout, forward.out);
  std::vector<at::Tensor> to;
  std::vector<at::Tensor> from;
  std::vector<at::Tensor> sums_to;
  std::vector<at::Tensor> sums_from;
  for (int member = 0; member < degree(); ++member) {
    const Heads heads = heads_of(member, q, k);
    const auto rows = whole.rows[static_cast<std::size_t>(member)];
    to.push_back(packed({{q, heads.q_begin, heads.q()},
                         {dout, heads.q_begin, heads.q()},
                         {k, heads.kv_begin, heads.kv()},
                         {v, heads.kv_begin, heads.kv()}}));
    from.push_back(at::empty({rows, width}, q.options()));
    sums_to.push_back(at::cat({forward.lse.narrow(0, heads.q_begin, heads.q()),
                               delta.narrow(0, heads.q_begin, heads.q())},
                              0)
                          .transpose(0, 1)
                          .contiguous());
    sums_from.push_back(at::empty({rows, 2 * own.q()}, statistics));
  }
  all_to_all(to, from);
  all_to_all(sums_to, sums_from);

  const auto all = at::cat(from).index_select(0, whole.by_document);
  const auto sums = at::cat(sums_from).index_select(0, whole.by_document).transpose(0, 1);
  const auto head_of_query =
      reads(own.q_begin, own.q_end, own.kv_begin, q.size(1) / k.size(1), q.device());
  Columns columns(all);
  const at::Tensor queries = columns.next(own.q(), dim).contiguous();
  const at::Tensor douts = columns.next(own.q(), v_dim).contiguous();
  const at::Tensor keys = expand(columns.next(own.kv(), dim).contiguous(), head_of_query);
  const at::Tensor values = expand(columns.next(own.kv(), v_dim).contiguous(), head_of_query);
  auto dq = at::zeros({all.size(0), own.q(), dim}, statistics);
  auto dk = at::zeros(keys.sizes(), statistics);
  auto dv = at::zeros(values.sizes(), statistics);
  if (own.q() > 0) {
    const auto blocks = detail::blocks_against(whole.batch, 1, 0, options.window);
    model::attention_backward_(dq, dk, dv, douts, queries, keys, values,
                               sums.narrow(0, 0, own.q()).contiguous(),
                               sums.narrow(0, own.q(), own.q()).contiguous(), blocks, options);
  }

  const auto gradients = packed({{dq, 0, own.q()},
                                 {fold(dk, head_of_query, own.kv()), 0, own.kv()},
                                 {fold(dv, head_of_query, own.kv()), 0, own.kv()}});
  const auto home = split_rows(gradients.index_select(0, whole.by_arrival), whole.rows);
  std::vector<at::Tensor> parts;
  for (int member = 0; member < degree(); ++member) {
    const Heads heads = heads_of(member, q, k);
    parts.push_back(
        at::empty({q.size(0), heads.q() * dim + heads.kv() * (dim + v_dim)}, statistics));
  }
  all_to_all(home, parts);
  std::vector<at::Tensor> dq_parts;
  auto dk_sum = at::zeros({k.size(0), k.size(1), dim}, statistics);
  auto dv_sum = at::zeros({v.size(0), v.size(1), v_dim}, statistics);
  for (int member = 0; member < degree(); ++member) {
    const Heads heads = heads_of(member, q, k);
    const auto& received = parts[static_cast<std::size_t>(member)];
    Columns home_columns(received);
    dq_parts.push_back(home_columns.next(heads.q(), dim));
    dk_sum.narrow(1, heads.kv_begin, heads.kv()).add_(home_columns.next(heads.kv(), dim));
    dv_sum.narrow(1, heads.kv_begin, heads.kv()).add_(home_columns.next(heads.kv(), v_dim));
  }
  const auto type = q.scalar_type();
  return {.dq = at::cat(dq_parts, 1).to(type), .dk = dk_sum.to(type), .dv = dv_sum.to(type)};
}

}  // namespace meshloom::parallel
