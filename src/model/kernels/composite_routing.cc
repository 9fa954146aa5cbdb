#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <tuple>
#include <vector>

#include "meshloom/core/error.h"
#include "model/kernels/composite.h"

namespace meshloom::model::ops::composite {
namespace {

// Keeps the sum of chosen sigmoid scores off zero, as DeepSeek-V3 does.
constexpr double kSigmoidFloor = 1e-20;

/// [tokens * k, H]: row (t, j), zero where the pair is not in source.
at::Tensor rows_by_pair(const at::Tensor& rows, const at::Tensor& source, std::int64_t pairs) {
  at::Tensor out = at::zeros({pairs, rows.size(1)}, rows.options());
  out.index_copy_(0, source, rows);
  return out;
}

/// Scores of the choice, -inf for the experts of all but the best groups.
at::Tensor limited_to_groups(const at::Tensor& scores, const RouterOptions& options) {
  const at::Tensor grouped = scores.view({scores.size(0), options.groups, -1});
  const at::Tensor sums = std::get<0>(at::sort(grouped, /*stable=*/true, 2, /*descending=*/true))
                              .slice(2, 0, 2)
                              .sum({2});
  const at::Tensor order = std::get<1>(at::sort(sums, /*stable=*/true, 1, /*descending=*/true));
  const at::Tensor out = at::ones_like(sums, at::kBool);
  out.scatter_(1, order.slice(1, 0, options.top_groups), false);
  return grouped.masked_fill(out.unsqueeze(2), -std::numeric_limits<double>::infinity())
      .view_as(scores);
}

/// What the weights of a token's experts are divided by, [T, 1].
at::Tensor chosen_sum(const at::Tensor& chosen, const RouterOptions& options) {
  const at::Tensor sum = chosen.sum({1}, true);
  return options.score == RouterScore::kSigmoid ? sum + kSigmoidFloor : sum;
}

}  // namespace

RouterOutput route(const at::Tensor& logits, const RouterOptions& options, const at::Tensor& bias) {
  RouterOutput out;
  const at::Tensor wide = logits.to(stat_type(logits));
  out.probabilities =
      options.score == RouterScore::kSoftmax ? at::softmax(wide, 1) : at::sigmoid(wide);
  out.lse = at::logsumexp(wide, {1});
  out.z_sum = out.lse.square().sum(at::kDouble).item<double>();
  at::Tensor choice = out.probabilities;
  if (bias.defined()) choice = choice + bias.to(choice.scalar_type());
  if (options.groups > 1) choice = limited_to_groups(choice, options);
  const at::Tensor order = std::get<1>(at::sort(choice, /*stable=*/true, 1, /*descending=*/true));
  out.experts = order.slice(1, 0, options.top_k).contiguous();
  out.weights = out.probabilities.gather(1, out.experts);
  if (options.normalize) out.weights = out.weights / chosen_sum(out.weights, options);
  out.weights = out.weights * options.scale;
  return out;
}

at::Tensor route_backward(const at::Tensor& dweights, const RouterOutput& forward,
                          const RouterOptions& options, const at::Tensor& dprobabilities,
                          std::span<const std::int64_t> group_rows, double z_weight,
                          at::ScalarType dtype) {
  const at::Tensor& p = forward.probabilities;
  const at::Tensor wide = dweights.to(p.scalar_type());
  at::Tensor dchosen = wide * options.scale;
  if (options.normalize) {
    const at::Tensor sum = chosen_sum(p.gather(1, forward.experts), options);
    dchosen = (dchosen - (wide * forward.weights).sum({1}, true)) / sum;
  }
  at::Tensor dp = at::zeros_like(p);
  dp.scatter_add_(1, forward.experts, dchosen);
  if (dprobabilities.defined()) {
    at::Tensor extra = dprobabilities.to(p.scalar_type());
    if (!group_rows.empty()) {
      const at::Tensor repeats =
          at::tensor(at::IntArrayRef(group_rows.data(), group_rows.size()), at::kLong);
      extra = extra.repeat_interleave(repeats.to(extra.device()), 0);
    }
    if (options.score == RouterScore::kSigmoid) {
      const at::Tensor sum = p.sum({1}, true);
      extra = (extra - (extra * p).sum({1}, true) / sum) / sum;
    }
    dp.add_(extra);
  }
  if (options.score == RouterScore::kSigmoid) {
    if (z_weight != 0.0) throw NotSupported("ops.route_backward", "z-loss with sigmoid scores");
    return (dp * p * (1.0 - p)).to(dtype);
  }
  at::Tensor dlogits = p * (dp - (dp * p).sum({1}, true));
  if (z_weight != 0.0) dlogits = dlogits + p * (forward.lse.unsqueeze(1) * (2.0 * z_weight));
  return dlogits.to(dtype);
}

ExpertOrder sort_by_expert(const at::Tensor& experts, std::int64_t expert_count) {
  const at::Tensor flat = experts.reshape({-1});
  at::Tensor sorted;
  ExpertOrder order;
  std::tie(sorted, order.source) = at::sort(flat, /*stable=*/true, 0, /*descending=*/false);
  const at::Tensor counts = at::bincount(flat, {}, expert_count).cpu();
  const auto* begin = counts.const_data_ptr<std::int64_t>();
  order.rows.assign(begin, begin + counts.numel());
  return order;
}

at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& source, std::int64_t k) {
  return x.index_select(0, source.div(k, "floor"));
}

at::Tensor gather_rows_backward(const at::Tensor& drows, const at::Tensor& source,
                                std::int64_t tokens, std::int64_t k) {
  return rows_by_pair(drows, source, tokens * k)
      .view({tokens, k, drows.size(1)})
      .sum({1}, false, stat_type(drows))
      .to(drows.scalar_type());
}

at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& source, const at::Tensor& weights) {
  const std::int64_t tokens = weights.size(0);
  const std::int64_t k = weights.size(1);
  const at::Tensor pairs = rows_by_pair(y, source, tokens * k).view({tokens, k, y.size(1)});
  return (pairs.to(stat_type(y)) * weights.unsqueeze(2)).sum({1}).to(y.scalar_type());
}

void embedding_backward_(at::Tensor& grad, const at::Tensor& ids, const at::Tensor& dy) {
  grad.index_add_(0, ids, dy.to(grad.scalar_type()));
}

double cross_entropy_rows_(at::Tensor& logits, const at::Tensor& labels, double scale) {
  const at::Tensor wide = logits.to(stat_type(logits));
  const at::Tensor lse = at::logsumexp(wide, {1}, true);
  const at::Tensor index = labels.unsqueeze(1);
  const double loss = (lse - wide.gather(1, index)).sum(at::kDouble).item<double>();
  if (scale != 0.0) {
    at::Tensor gradient = (wide - lse).exp_();
    gradient.scatter_add_(1, index, at::full(index.sizes(), -1.0, gradient.options()));
    logits.copy_(gradient.mul_(scale));
  }
  return loss;
}

}  // namespace meshloom::model::ops::composite
