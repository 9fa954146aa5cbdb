#include "meshloom/parallel/tensor_parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <tuple>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/parameters.h"

namespace meshloom::parallel {
namespace {

namespace ops = model::ops;

constexpr comm::CallOptions kTensorCall{.timeout = std::nullopt, .purpose = "tensor"};
constexpr std::int64_t kChunkBytes = std::int64_t{16} << 20;  // of logits
constexpr std::int64_t kMinimumRows = 64;
/// A product whose sums are scattered is made in so many pieces, each with at least so many rows of
/// every rank: fewer make products slow.
constexpr std::int64_t kPieces = 2;
constexpr std::int64_t kLeastPieceRows = 128;

at::ScalarType statistics(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

TensorParallel::TensorParallel(comm::Communicator group, std::int64_t tokens,
                               std::int64_t vocabulary, SpanSink spans)
    : group_(std::move(group)), spans_(std::move(spans)) {
  for (int rank = 0; rank < group_.size(); ++rank) {
    const auto [begin, end] = model::shard_range(tokens, {rank, group_.size()});
    rows_.push_back(end - begin);
  }
  std::tie(first_token_id_, last_token_id_) =
      model::shard_range(vocabulary, {group_.rank(), group_.size()});
}

plan::TokenRange TensorParallel::own_rows(std::int64_t tokens) const {
  const auto [begin, end] = model::shard_range(tokens, {group_.rank(), group_.size()});
  return {begin, end};
}

comm::Work TensorParallel::gather(const at::Tensor& rows) {
  return group_.all_gather(rows.contiguous(), rows_, kTensorCall);
}

comm::Work TensorParallel::scatter(const at::Tensor& partial) {
  return group_.reduce_scatter(partial, rows_, kTensorCall);
}

at::Tensor TensorParallel::finish(comm::Work work) const {
  const auto waiting = std::chrono::steady_clock::now();
  at::Tensor result = work.result();
  if (spans_) spans_(Span::Kind::kTensor, waiting, std::chrono::steady_clock::now());
  return result;
}

std::pair<at::Tensor, at::Tensor> TensorParallel::gathered_product(const at::Tensor& x,
                                                                   std::int64_t width,
                                                                   const RowProduct& multiply) {
  comm::Work gathering = gather(x);
  const std::int64_t tokens = std::accumulate(rows_.begin(), rows_.end(), std::int64_t{0});
  const plan::TokenRange own = own_rows(tokens);
  const at::Tensor product = at::empty({tokens, width}, x.options());
  const auto multiply_rows = [&](const at::Tensor& rows, std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    at::Tensor part = product.narrow(0, begin, end - begin);
    multiply(part, rows);
  };
  multiply_rows(x, own.begin, own.end);
  at::Tensor all = finish(std::move(gathering));
  multiply_rows(all.narrow(0, 0, own.begin), 0, own.begin);
  multiply_rows(all.narrow(0, own.end, tokens - own.end), own.end, tokens);
  return {product, std::move(all)};
}

at::Tensor TensorParallel::column(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& bias) {
  return gathered_product(x, weight.size(0),
                          [&](at::Tensor& part, const at::Tensor& rows) {
                            ops::matmul_nt_out(part, rows, weight, bias);
                          })
      .first;
}

at::Tensor TensorParallel::column_backward(const at::Tensor& dy, const at::Tensor& weight,
                                           const at::Tensor& x, const WeightGradient& add) {
  comm::Work gathering = gather(x);
  comm::Work scattering = scatter(ops::matmul_nn(dy, weight));
  add(finish(std::move(gathering)));
  return finish(std::move(scattering));
}

at::Tensor TensorParallel::scattered_product(const at::Tensor& x, const at::Tensor& weight) {
  const std::int64_t least = *std::min_element(rows_.begin(), rows_.end());
  const std::int64_t pieces = least >= kPieces * kLeastPieceRows ? kPieces : 1;
  std::vector<comm::Work> scattering;
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    std::vector<std::int64_t> sizes;
    for (const std::int64_t rows : rows_) {
      sizes.push_back(rows * (piece + 1) / pieces - rows * piece / pieces);
    }
    const std::int64_t all = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
    const at::Tensor product = at::empty({all, weight.size(0)}, x.options());
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (std::size_t rank = 0; rank < rows_.size(); ++rank) {
      at::Tensor part = product.narrow(0, to, sizes[rank]);
      const std::int64_t begin = from + rows_[rank] * piece / pieces;
      if (sizes[rank] > 0) ops::matmul_nt_out(part, x.narrow(0, begin, sizes[rank]), weight);
      from += rows_[rank];
      to += sizes[rank];
    }
    scattering.push_back(group_.reduce_scatter(product, sizes, kTensorCall));
  }
  std::vector<at::Tensor> sums;
  for (comm::Work& work : scattering) sums.push_back(finish(std::move(work)));
  return sums.size() == 1 ? std::move(sums.front()) : at::cat(sums);
}

at::Tensor TensorParallel::row(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias) {
  at::Tensor y = scattered_product(x, weight);
  if (bias.defined()) y.add_(bias);
  return y;
}

model::ShardedLinear::RowGradients TensorParallel::row_backward(const at::Tensor& dy,
                                                                const at::Tensor& weight) {
  auto [dx, all] = gathered_product(
      dy, weight.size(1),
      [&](at::Tensor& part, const at::Tensor& rows) { ops::matmul_nn_out(part, rows, weight); });
  return {std::move(dx), std::move(all)};
}

at::Tensor TensorParallel::all_rows(const at::Tensor& x) { return finish(gather(x)); }

at::Tensor TensorParallel::all_rows_backward(const at::Tensor& partial) {
  return finish(scatter(partial.contiguous()));
}

at::Tensor TensorParallel::embedding(const at::Tensor& tokens, const at::Tensor& weight) {
  at::Tensor partial = at::zeros({tokens.size(0), weight.size(1)}, weight.options());
  const auto [index, ids] = own_tokens(tokens);
  partial.index_copy_(0, index, ops::embedding(weight, ids));
  return finish(scatter(partial));
}

void TensorParallel::embedding_backward(
    const at::Tensor& tokens, const at::Tensor& dy,
    const std::function<void(const at::Tensor& ids, const at::Tensor& rows)>& add) {
  const auto [index, ids] = own_tokens(tokens);
  add(ids, finish(gather(dy)).index_select(0, index));
}

std::pair<at::Tensor, at::Tensor> TensorParallel::own_tokens(const at::Tensor& tokens) const {
  at::Tensor index =
      at::nonzero((tokens >= first_token_id_).logical_and_(tokens < last_token_id_)).squeeze(1);
  at::Tensor ids = tokens.index_select(0, index).sub_(first_token_id_);
  return {std::move(index), std::move(ids)};
}

void TensorParallel::merge(at::Tensor& lse, at::Tensor& target) {
  const at::Tensor own = at::stack({lse, target}).unsqueeze(0);
  const std::vector<std::int64_t> one(rows_.size(), 1);
  const at::Tensor all = finish(group_.all_gather(own, one, kTensorCall));
  lse = at::logsumexp(all.select(1, 0), 0);
  target = all.select(1, 1).sum(0);
}

ops::CrossEntropyOutput TensorParallel::cross_entropy(const at::Tensor& hidden,
                                                      const at::Tensor& weight,
                                                      const at::Tensor& labels, double loss_weight,
                                                      const ops::LogitGradientSink* add) {
  const at::Tensor all = finish(gather(hidden));
  ops::CrossEntropyOutput out;
  const at::Tensor targets = at::nonzero(labels != model::kIgnoreLabel).squeeze(1);
  out.tokens = targets.numel();
  at::Tensor dall = add != nullptr ? at::zeros_like(all) : at::Tensor();
  const std::int64_t row_bytes = std::max<std::int64_t>(1, weight.size(0)) * weight.element_size();
  const std::int64_t chunk = std::max(kMinimumRows, kChunkBytes / row_bytes);
  for (std::int64_t begin = 0; begin < out.tokens; begin += chunk) {
    const at::Tensor index = targets.narrow(0, begin, std::min(chunk, out.tokens - begin));
    const at::Tensor x = all.index_select(0, index);
    const auto [held, held_ids] = own_tokens(labels.index_select(0, index));
    at::Tensor logits = ops::matmul_nt(x, weight);
    const at::Tensor wide = logits.to(statistics(logits));
    at::Tensor lse = at::logsumexp(wide, 1);
    at::Tensor target = at::zeros_like(lse);
    target.index_copy_(0, held, at::index(wide, {held, held_ids}));
    merge(lse, target);
    out.loss_sum += (lse - target).sum(at::kDouble).item<double>();
    if (add == nullptr) continue;
    at::Tensor dlogits = (wide - lse.unsqueeze(1)).exp_();
    at::index_put_(dlogits, {held, held_ids}, at::index(dlogits, {held, held_ids}) - 1.0);
    logits = dlogits.mul_(loss_weight).to(logits.scalar_type());
    dall.index_copy_(0, index, ops::matmul_nn(logits, weight));
    (*add)(logits, x);
  }
  if (add != nullptr) out.dhidden = finish(scatter(dall));
  return out;
}

model::SequenceBatch stream_of(const model::SequenceBatch& batch, plan::TokenRange rows) {
  model::SequenceBatch result;
  std::int64_t row = 0;
  for (const model::DocumentSlice& document : batch.documents) {
    model::DocumentSlice part = document;
    for (plan::TokenRange& range : part.ranges) {
      const std::int64_t size = range.size();
      const std::int64_t begin = std::clamp<std::int64_t>(rows.begin - row, 0, size);
      const std::int64_t end = std::clamp<std::int64_t>(rows.end - row, begin, size);
      range = {range.begin + begin, range.begin + end};
      row += size;
    }
    result.documents.push_back(part);
  }
  return result;
}

}  // namespace meshloom::parallel
