#include "parallel/internal/head_group.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <iterator>

#include "meshloom/plan/slicing.h"

namespace meshloom::parallel::detail {

GroupTokens group_tokens(const model::SequenceBatch& batch, int degree, int group, int index,
                         const at::Device& device) {
  GroupTokens tokens;
  const int groups = degree / group;
  std::int64_t total = 0;
  std::vector<std::int64_t> first_row;
  for (const auto& document : batch.documents) {
    auto& entry = tokens.batch.documents.emplace_back(document);
    entry.ranges = plan::member_ranges(document.length, groups, index);
    first_row.push_back(total);
    total += entry.tokens();
  }
  auto by_arrival = at::empty({total}, at::TensorOptions().dtype(at::kLong));
  auto by_document = at::empty({total}, at::TensorOptions().dtype(at::kLong));
  auto* arrival = by_arrival.mutable_data_ptr<std::int64_t>();
  auto* document_row = by_document.mutable_data_ptr<std::int64_t>();
  std::int64_t row = 0;
  for (int part = 0; part < group; ++part) {
    tokens.begin.push_back(row);
    for (std::size_t d = 0; d < batch.documents.size(); ++d) {
      const auto& [first, second] = tokens.batch.documents[d].ranges;
      const std::int64_t length = batch.documents[d].length;
      for (const auto& range : plan::member_ranges(length, degree, index * group + part)) {
        if (range.size() == 0) continue;
        const bool early = range.begin >= first.begin && range.begin < first.end;
        const std::int64_t base =
            early ? first_row[d] - first.begin : first_row[d] + first.size() - second.begin;
        for (auto t = range.begin; t < range.end; ++t, ++row) {
          arrival[row] = base + t;
          document_row[base + t] = row;
        }
      }
    }
    tokens.rows.push_back(row - tokens.begin.back());
  }
  tokens.by_document = by_document.to(device);
  tokens.by_arrival = by_arrival.to(device);
  tokens.batch.tokens = by_document;  // its size is the batch's
  return tokens;
}

HeadGroup::Shares HeadGroup::shares(std::int64_t heads, std::int64_t kv_heads) const {
  Shares result;
  const auto parts = static_cast<int>(ranks_.size());
  for (int part = 0; part < parts; ++part) {
    result.push_back(plan::head_share(heads, kv_heads, parts, part));
  }
  return result;
}

at::Tensor HeadGroup::to_heads(Parcel& parcel, const HeadColumns& columns, const Shares& shares,
                               const GroupTokens& tokens, at::ScalarType type, Buffer sent,
                               Buffer received) {
  const at::Tensor& like =
      columns.by_query.empty() ? columns.by_key_value.front() : columns.by_query.front();
  const std::int64_t rows = like.size(0);
  const std::int64_t dim = like.size(2);
  const auto options = like.options().dtype(type);
  const auto pack = [&](const at::Tensor& to, const plan::HeadShare& share) {
    std::int64_t column = 0;
    for (const at::Tensor& x : columns.by_query) {
      to.narrow(1, column, share.q()).copy_(x.narrow(1, share.q_begin, share.q()));
      column += share.q();
    }
    for (const at::Tensor& x : columns.by_key_value) {
      to.narrow(1, column, share.kv()).copy_(x.narrow(1, share.kv_begin, share.kv()));
      column += share.kv();
    }
  };
  const auto width = [&](const plan::HeadShare& share) {
    return std::ssize(columns.by_query) * share.q() + std::ssize(columns.by_key_value) * share.kv();
  };
  const auto own = static_cast<std::size_t>(part_);
  std::int64_t others = 0;
  for (std::size_t m = 0; m < shares.size(); ++m) others += m == own ? 0 : width(shares[m]);
  const at::Tensor out = buffers_->take(sent, {others * rows * dim}, options);
  const at::Tensor in =
      buffers_->take(received, {tokens.by_document.size(0), width(shares[own]), dim}, options);
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const std::size_t m = (own + i) % shares.size();  // everybody begins with another one
    const at::Tensor arriving = in.narrow(0, tokens.begin[m], tokens.rows[m]);
    if (m == own) {
      pack(arriving, shares[m]);
      continue;
    }
    const std::int64_t elements = width(shares[m]) * rows * dim;
    const at::Tensor leaving = out.narrow(0, offset, elements).view({rows, width(shares[m]), dim});
    offset += elements;
    pack(leaving, shares[m]);
    parcel.send(ranks_[m], leaving);
    parcel.receive(ranks_[m], arriving);
  }
  return in;
}

std::vector<at::Tensor> HeadGroup::to_tokens(Parcel& parcel, const at::Tensor& columns, int queries,
                                             int key_values, const Shares& shares,
                                             const GroupTokens& tokens, Buffer received) {
  const auto own = static_cast<std::size_t>(part_);
  const std::int64_t rows = tokens.rows[own];
  const std::int64_t dim = columns.size(2);
  const auto width = [&](const plan::HeadShare& share) {
    return queries * share.q() + key_values * share.kv();
  };
  std::int64_t others = 0;
  for (std::size_t m = 0; m < shares.size(); ++m) others += m == own ? 0 : width(shares[m]);
  const at::Tensor in = buffers_->take(received, {others * rows * dim}, columns.options());
  std::vector<at::Tensor> result(shares.size());
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const std::size_t m = (own + i) % shares.size();
    const at::Tensor leaving = columns.narrow(0, tokens.begin[m], tokens.rows[m]);
    if (m == own) {
      result[m] = leaving;
      continue;
    }
    const std::int64_t elements = width(shares[m]) * rows * dim;
    result[m] = in.narrow(0, offset, elements).view({rows, width(shares[m]), dim});
    offset += elements;
    parcel.send(ranks_[m], leaving);
    parcel.receive(ranks_[m], result[m]);
  }
  return result;
}

at::Tensor HeadGroup::ordered(const at::Tensor& rows, const at::Tensor& order, Buffer name) {
  at::Tensor result = buffers_->take(name, rows.sizes(), rows.options());
  if (result.numel() > 0) at::index_select_out(result, rows, 0, order);
  return result;
}

}  // namespace meshloom::parallel::detail
