#include "parallel/internal/unit_exchange.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {

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

namespace detail {
namespace {

/// From so many spans on, one copy by index costs less than one each.
constexpr std::size_t kFewSpans = 16;

bool covers(std::span<const HeadRun> runs, const at::Tensor& q, const at::Tensor& k) {
  return runs.size() == 1 && runs[0].q == q.size(1) && runs[0].kv == k.size(1);
}

}  // namespace

int member_index(const comm::Communicator& hdp, const std::vector<int>& ranks, const char* where) {
  const auto own = std::find(ranks.begin(), ranks.end(), hdp.rank());
  MESHLOOM_CHECK(
      own != ranks.end(), where,
      fmt::format("rank {} is not in the unit's ranks [{}]", hdp.rank(), fmt::join(ranks, ", ")));
  return static_cast<int>(own - ranks.begin());
}

std::vector<std::int64_t> document_lengths(const model::SequenceBatch& batch) {
  std::vector<std::int64_t> lengths;
  lengths.reserve(batch.documents.size());
  for (const auto& document : batch.documents) lengths.push_back(document.length);
  return lengths;
}

std::vector<plan::TokenRun> own_runs(const model::SequenceBatch& batch) {
  std::vector<plan::TokenRun> runs;
  for (std::size_t d = 0; d < batch.documents.size(); ++d) {
    for (const auto& range : batch.documents[d].ranges) {
      if (range.size() > 0) runs.push_back({static_cast<int>(d), range.begin, range.size()});
    }
  }
  return runs;
}

std::vector<model::AttentionBlock> blocks_against(const model::SequenceBatch& batch,
                                                  std::span<const plan::TokenRun> keys,
                                                  std::int64_t window) {
  struct Keys {
    const plan::TokenRun* run;
    std::int64_t row;
  };
  std::vector<std::vector<Keys>> of_document(batch.documents.size());
  std::int64_t row = 0;
  for (const plan::TokenRun& run : keys) {
    of_document.at(static_cast<std::size_t>(run.document)).push_back({&run, row});
    row += run.rows;
  }
  std::vector<model::AttentionBlock> blocks;
  std::int64_t q_row = 0;
  for (std::size_t d = 0; d < batch.documents.size(); ++d) {
    for (const auto& query : batch.documents[d].ranges) {
      for (const Keys& key : of_document[d]) {
        const std::int64_t end = key.run->position + key.run->rows;
        const bool causal = key.run->position < query.end;
        const bool near = window == 0 || end - 1 > query.begin - window;
        if (query.size() > 0 && causal && near) {
          blocks.push_back({.q_begin = q_row,
                            .q_rows = query.size(),
                            .q_position = query.begin,
                            .k_begin = key.row,
                            .k_rows = key.run->rows,
                            .k_position = key.run->position});
        }
      }
      q_row += query.size();
    }
  }
  return blocks;
}

at::ScalarType statistics_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType wire_type(const at::Tensor& k, const ExchangeOptions& options) {
  const at::ScalarType own = k.scalar_type();
  if (!options.wire_type || c10::elementSize(*options.wire_type) >= c10::elementSize(own)) {
    return own;
  }
  return *options.wire_type;
}

RowMap::RowMap(std::vector<plan::RowSpan> spans, const at::Device& device)
    : spans_(std::move(spans)), rows_(plan::rows_of(spans_)) {
  if (spans_.size() <= kFewSpans) return;
  at::Tensor index = at::empty({rows_}, at::TensorOptions().dtype(at::kLong));
  auto* to = index.mutable_data_ptr<std::int64_t>();
  for (const plan::RowSpan& span : spans_) {
    for (std::int64_t i = 0; i < span.count; ++i) *to++ = span.begin + i;
  }
  index_ = index.to(device);
}

bool RowMap::is_all(std::int64_t rows) const {
  return spans_.size() == 1 && spans_[0].begin == 0 && spans_[0].count == rows;
}

void RowMap::gather(at::Tensor to, const at::Tensor& from) const {
  if (index_.defined()) {
    if (to.scalar_type() == from.scalar_type()) {
      at::index_select_out(to, from, 0, index_);
    } else {
      to.copy_(from.index_select(0, index_));
    }
    return;
  }
  std::int64_t row = 0;
  for (const plan::RowSpan& span : spans_) {
    to.narrow(0, row, span.count).copy_(from.narrow(0, span.begin, span.count));
    row += span.count;
  }
}

void RowMap::add(at::Tensor to, const at::Tensor& from) const {
  if (index_.defined()) {
    to.index_add_(0, index_, from);
    return;
  }
  std::int64_t row = 0;
  for (const plan::RowSpan& span : spans_) {
    to.narrow(0, span.begin, span.count).add_(from.narrow(0, row, span.count));
    row += span.count;
  }
}

std::vector<HeadRun> head_runs(std::int64_t q_begin, std::int64_t q_end, std::int64_t group) {
  std::vector<HeadRun> runs;
  const std::int64_t first_kv = q_begin / group;
  const auto add = [&](std::int64_t begin, std::int64_t end) {
    if (begin >= end) return;
    runs.push_back({.q_begin = begin - q_begin,
                    .q = end - begin,
                    .kv_begin = begin / group - first_kv,
                    .kv = std::max<std::int64_t>(1, (end - begin) / group)});
  };
  const std::int64_t whole_begin = std::min(q_end, (q_begin + group - 1) / group * group);
  const std::int64_t whole_end = std::max(whole_begin, q_end / group * group);
  add(q_begin, whole_begin);
  add(whole_begin, whole_end);
  add(whole_end, q_end);
  return runs;
}

void attend_(at::Tensor& out, at::Tensor& lse, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& v, std::span<const model::AttentionBlock> blocks,
             const model::AttentionOptions& options, std::span<const HeadRun> runs) {
  if (blocks.empty()) return;
  if (covers(runs, q, k)) {
    model::attention_forward_(out, lse, q, k, v, blocks, options);
    return;
  }
  for (const HeadRun& run : runs) {
    at::Tensor part = out.narrow(1, run.q_begin, run.q);
    at::Tensor sums = lse.narrow(0, run.q_begin, run.q);
    model::attention_forward_(part, sums, q.narrow(1, run.q_begin, run.q),
                              k.narrow(1, run.kv_begin, run.kv), v.narrow(1, run.kv_begin, run.kv),
                              blocks, options);
  }
}

void attend_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                      const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& lse, const at::Tensor& delta,
                      std::span<const model::AttentionBlock> blocks,
                      const model::AttentionOptions& options, std::span<const HeadRun> runs) {
  if (blocks.empty()) return;
  if (covers(runs, q, k)) {
    model::attention_backward_(dq, dk, dv, dout, q, k, v, lse, delta, blocks, options);
    return;
  }
  for (const HeadRun& run : runs) {
    const auto of_q = [&](const at::Tensor& x) { return x.narrow(1, run.q_begin, run.q); };
    const auto of_kv = [&](const at::Tensor& x) { return x.narrow(1, run.kv_begin, run.kv); };
    at::Tensor dq_part = of_q(dq);
    at::Tensor dk_part = of_kv(dk);
    at::Tensor dv_part = of_kv(dv);
    model::attention_backward_(dq_part, dk_part, dv_part, of_q(dout), of_q(q), of_kv(k), of_kv(v),
                               lse.narrow(0, run.q_begin, run.q),
                               delta.narrow(0, run.q_begin, run.q), blocks, options);
  }
}

void Parcel::send(int peer, const at::Tensor& tensor) {
  if (tensor.numel() > 0) sends_.push_back({peer, tensor});
}

void Parcel::receive(int peer, const at::Tensor& tensor) {
  if (tensor.numel() > 0) receives_.push_back({peer, tensor});
}

void Parcel::post(comm::Communicator& hdp) {
  if (sends_.empty() && receives_.empty()) return;
  const auto transfers = [](const std::vector<Message>& messages) {
    std::vector<comm::Transfer> result;
    for (const Message& message : messages) {
      result.push_back({.peer = message.peer, .tensor = &message.tensor});
    }
    return result;
  };
  posted_at_ = std::chrono::steady_clock::now();
  work_ = hdp.send_receive(transfers(sends_), transfers(receives_),
                           {.timeout = std::nullopt, .purpose = "exchange"});
  posted_ = true;
}

void Parcel::finish(const SpanSink& spans) {
  if (!posted_) return;
  const auto waiting = std::chrono::steady_clock::now();
  work_.wait();
  posted_ = false;
  if (!spans) return;
  const auto now = std::chrono::steady_clock::now();
  spans(Span::Kind::kExchange, posted_at_, now);
  spans(Span::Kind::kWait, waiting, now);
}

}  // namespace detail
}  // namespace meshloom::parallel
