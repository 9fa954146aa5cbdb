#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>

#include <algorithm>
#include <limits>

#include "model/kernels/composite.h"

namespace meshloom::model::ops::composite {
namespace {

constexpr std::int64_t kQueryRows = 256;  // bounds the scores that exist at a time
constexpr double kMasked = -std::numeric_limits<double>::infinity();

/// Some query rows of a block and the key rows that they may see.
struct Piece {
  std::int64_t q_begin, q_rows, q_position;
  std::int64_t k_begin, k_rows, k_position;
};

template <class Visit>
void for_each_piece(std::span<const AttentionBlock> blocks, std::int64_t window,
                    const Visit& visit) {
  for (const AttentionBlock& block : blocks) {
    for (std::int64_t row = 0; row < block.q_rows; row += kQueryRows) {
      Piece piece{block.q_begin + row,
                  std::min(kQueryRows, block.q_rows - row),
                  block.q_position + row,
                  0,
                  0,
                  0};
      const std::int64_t last = piece.q_position + piece.q_rows - 1;
      const std::int64_t first = window > 0 ? piece.q_position - window + 1 : 0;
      const std::int64_t low = std::clamp(first - block.k_position, std::int64_t{0}, block.k_rows);
      const std::int64_t high =
          std::clamp(last + 1 - block.k_position, std::int64_t{0}, block.k_rows);
      if (high <= low) continue;
      piece.k_begin = block.k_begin + low;
      piece.k_rows = high - low;
      piece.k_position = block.k_position + low;
      visit(piece);
    }
  }
}

/// Rows [begin, begin + rows) of x [T, H, D] as [groups, H / groups * rows, D] in `type`.
at::Tensor grouped(const at::Tensor& x, std::int64_t begin, std::int64_t rows, std::int64_t groups,
                   at::ScalarType type) {
  return x.slice(0, begin, begin + rows).to(type).transpose(0, 1).reshape({groups, -1, x.size(2)});
}

/// The inverse of `grouped`: [groups, n * rows, D] as [rows, H, D].
at::Tensor ungrouped(const at::Tensor& x, std::int64_t heads, std::int64_t rows) {
  return x.view({heads, rows, x.size(2)}).transpose(0, 1);
}

/// Scaled scores [Hkv, n * rows, keys], -inf where a query does not see a key.
at::Tensor scores_of(const at::Tensor& q, const at::Tensor& k, const Piece& piece,
                     const AttentionOptions& options) {
  at::Tensor scores = at::bmm(q, k.transpose(1, 2)).mul_(options.scale);
  const auto index = q.options().dtype(at::kLong);
  const at::Tensor rows =
      at::arange(piece.q_position, piece.q_position + piece.q_rows, index).unsqueeze(1);
  const at::Tensor keys =
      at::arange(piece.k_position, piece.k_position + piece.k_rows, index).unsqueeze(0);
  at::Tensor hidden = keys > rows;
  if (options.window > 0) hidden = hidden.logical_or(keys <= rows - options.window);
  scores.view({scores.size(0), -1, piece.q_rows, piece.k_rows}).masked_fill_(hidden, kMasked);
  return scores;
}

}  // namespace

void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v,
                        std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  const at::ScalarType type = lse.scalar_type();
  const std::int64_t heads = q.size(1);
  const std::int64_t groups = k.size(1);
  for_each_piece(blocks, options.window, [&](const Piece& piece) {
    const at::Tensor query = grouped(q, piece.q_begin, piece.q_rows, groups, type);
    const at::Tensor key = grouped(k, piece.k_begin, piece.k_rows, groups, type);
    const at::Tensor value = grouped(v, piece.k_begin, piece.k_rows, groups, type);
    at::Tensor scores = scores_of(query, key, piece, options);
    const at::Tensor seen = at::logsumexp(scores, {2}, true);
    const at::Tensor shift = seen.masked_fill(seen == kMasked, 0.0);
    const at::Tensor out =
        ungrouped(at::bmm(scores.sub_(shift).exp_(), value), heads, piece.q_rows);
    const at::Tensor block_lse = seen.view({heads, piece.q_rows});
    at::Tensor state = lse.slice(1, piece.q_begin, piece.q_begin + piece.q_rows);
    at::Tensor total = accumulator.slice(0, piece.q_begin, piece.q_begin + piece.q_rows);
    const at::Tensor merged = at::logaddexp(state, block_lse);
    const at::Tensor base = merged.masked_fill(merged == kMasked, 0.0);
    const at::Tensor keep = (state - base).exp_().t().unsqueeze(2);
    const at::Tensor take = (block_lse - base).exp_().t().unsqueeze(2);
    total.copy_(total * keep + out * take);
    state.copy_(merged);
  });
}

void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& lse, const at::Tensor& delta,
                         std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  const at::ScalarType type = lse.scalar_type();
  const std::int64_t heads = q.size(1);
  const std::int64_t groups = k.size(1);
  for_each_piece(blocks, options.window, [&](const Piece& piece) {
    const std::int64_t q_end = piece.q_begin + piece.q_rows;
    const std::int64_t k_end = piece.k_begin + piece.k_rows;
    const at::Tensor query = grouped(q, piece.q_begin, piece.q_rows, groups, type);
    const at::Tensor dy = grouped(dout, piece.q_begin, piece.q_rows, groups, type);
    const at::Tensor key = grouped(k, piece.k_begin, piece.k_rows, groups, type);
    const at::Tensor value = grouped(v, piece.k_begin, piece.k_rows, groups, type);
    const auto per_row = [&](const at::Tensor& x) {
      return x.slice(1, piece.q_begin, q_end).reshape({groups, -1, 1});
    };
    const at::Tensor total = per_row(lse);
    const at::Tensor probabilities =
        scores_of(query, key, piece, options).sub_(total.masked_fill(total == kMasked, 0.0)).exp_();
    dv.slice(0, piece.k_begin, k_end)
        .add_(ungrouped(at::bmm(probabilities.transpose(1, 2), dy), groups, piece.k_rows));
    const at::Tensor dscores = at::bmm(dy, value.transpose(1, 2))
                                   .sub_(per_row(delta))
                                   .mul_(probabilities)
                                   .mul_(options.scale);
    dq.slice(0, piece.q_begin, q_end).add_(ungrouped(at::bmm(dscores, key), heads, piece.q_rows));
    dk.slice(0, piece.k_begin, k_end)
        .add_(ungrouped(at::bmm(dscores.transpose(1, 2), query), groups, piece.k_rows));
  });
}

}  // namespace meshloom::model::ops::composite
