#include <ATen/ops/empty.h>

#include <string>
#include <vector>

#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"

namespace meshloom::model::ops {
namespace {

using kernels::check_shape;
using kernels::check_type;

/// Stable counting sort on the host.
ExpertOrder counting_sort(const at::Tensor& experts, std::int64_t expert_count) {
  const std::int64_t pairs = experts.numel();
  const auto* expert = experts.const_data_ptr<std::int64_t>();
  ExpertOrder order;
  order.rows.assign(static_cast<std::size_t>(expert_count), 0);
  for (std::int64_t i = 0; i < pairs; ++i) {
    MESHLOOM_CHECK(expert[i] >= 0 && expert[i] < expert_count, "ops.sort_by_expert",
                   "expert " + std::to_string(expert[i]) + " of " + std::to_string(expert_count));
    ++order.rows[static_cast<std::size_t>(expert[i])];
  }
  std::vector<std::int64_t> next(order.rows.size(), 0);
  for (std::size_t e = 1; e < next.size(); ++e) next[e] = next[e - 1] + order.rows[e - 1];
  order.source = at::empty({pairs}, experts.options());
  auto* source = order.source.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < pairs; ++i) source[next[static_cast<std::size_t>(expert[i])]++] = i;
  return order;
}

}  // namespace

RouterOutput route(const at::Tensor& logits, const RouterOptions& options) {
  check_shape(logits, {-1, -1}, "ops.route", "logits");
  MESHLOOM_CHECK_GE(options.top_k, 1, "ops.route", "top_k");
  MESHLOOM_CHECK_LE(options.top_k, logits.size(1), "ops.route", "top_k");
  return composite::route(logits, options);
}

at::Tensor route_backward(const at::Tensor& dweights, const RouterOutput& forward,
                          const RouterOptions& options, const at::Tensor& dprobabilities,
                          std::span<const std::int64_t> group_rows, double z_weight,
                          at::ScalarType dtype) {
  constexpr const char* kWhere = "ops.route_backward";
  const std::int64_t tokens = forward.probabilities.size(0);
  check_shape(dweights, {tokens, options.top_k}, kWhere, "dweights");
  if (dprobabilities.defined()) {
    const std::int64_t groups =
        group_rows.empty() ? 1 : static_cast<std::int64_t>(group_rows.size());
    check_shape(dprobabilities, {groups, forward.probabilities.size(1)}, kWhere, "dprobabilities");
    if (!group_rows.empty()) kernels::check_rows(group_rows, tokens, kWhere);
  }
  return composite::route_backward(dweights, forward, options, dprobabilities, group_rows, z_weight,
                                   dtype);
}

ExpertOrder sort_by_expert(const at::Tensor& experts, std::int64_t expert_count) {
  check_shape(experts, {-1, -1}, "ops.sort_by_expert", "experts");
  check_type(experts, at::kLong, "ops.sort_by_expert", "experts");
  MESHLOOM_CHECK_GE(expert_count, 1, "ops.sort_by_expert", "expert_count");
  if (!experts.device().is_cpu()) return composite::sort_by_expert(experts, expert_count);
  return counting_sort(experts.contiguous(), expert_count);
}

at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& source, std::int64_t k) {
  check_shape(x, {-1, -1}, "ops.gather_rows", "x");
  check_shape(source, {-1}, "ops.gather_rows", "source");
  MESHLOOM_CHECK_GE(k, 1, "ops.gather_rows", "k");
  return composite::gather_rows(x, source, k);
}

at::Tensor gather_rows_backward(const at::Tensor& drows, const at::Tensor& source,
                                std::int64_t tokens, std::int64_t k) {
  check_shape(drows, {-1, -1}, "ops.gather_rows_backward", "drows");
  check_shape(source, {drows.size(0)}, "ops.gather_rows_backward", "source");
  MESHLOOM_CHECK_GE(k, 1, "ops.gather_rows_backward", "k");
  return composite::gather_rows_backward(drows, source, tokens, k);
}

at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& source, const at::Tensor& weights) {
  check_shape(y, {-1, -1}, "ops.combine_rows", "y");
  check_shape(source, {y.size(0)}, "ops.combine_rows", "source");
  check_shape(weights, {-1, -1}, "ops.combine_rows", "weights");
  return composite::combine_rows(y, source, weights);
}

std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& dout, const at::Tensor& y,
                                                        const at::Tensor& source,
                                                        const at::Tensor& weights) {
  constexpr const char* kWhere = "ops.combine_rows_backward";
  check_shape(weights, {-1, -1}, kWhere, "weights");
  check_shape(y, {-1, -1}, kWhere, "y");
  check_shape(dout, {weights.size(0), y.size(1)}, kWhere, "dout");
  check_shape(source, {y.size(0)}, kWhere, "source");
  return composite::combine_rows_backward(dout, y, source, weights);
}

at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids) {
  check_shape(weight, {-1, -1}, "ops.embedding", "weight");
  check_shape(ids, {-1}, "ops.embedding", "ids");
  return weight.index_select(0, ids);
}

void embedding_backward_(at::Tensor& grad, const at::Tensor& ids, const at::Tensor& dy) {
  check_shape(grad, {-1, -1}, "ops.embedding_backward_", "grad");
  check_shape(ids, {-1}, "ops.embedding_backward_", "ids");
  check_shape(dy, {ids.size(0), grad.size(1)}, "ops.embedding_backward_", "dy");
  composite::embedding_backward_(grad, ids, dy);
}

}  // namespace meshloom::model::ops
