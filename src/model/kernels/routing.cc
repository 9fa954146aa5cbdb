#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"
#include "model/kernels/dispatch.h"

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

template <class T>
RouterOutput route_rows(const at::Tensor& logits, const RouterOptions& options,
                        const at::Tensor& bias) {
  const std::int64_t rows = logits.size(0);
  const std::int64_t experts = logits.size(1);
  RouterOutput out;
  out.probabilities = at::empty({rows, experts}, logits.options());
  out.weights = at::empty({rows, options.top_k}, logits.options());
  out.experts = at::empty({rows, options.top_k}, logits.options().dtype(at::kLong));
  out.lse = at::empty({rows}, logits.options());
  kernels::for_rows(
      rows, kernels::row_grain(4 * experts), [&](std::int64_t begin, std::int64_t end) {
        kernels::RouteTask<T> task{};
        task.logits = logits.const_data_ptr<T>() + begin * logits.stride(0);
        task.probabilities = out.probabilities.mutable_data_ptr<T>() + begin * experts;
        task.weights = out.weights.mutable_data_ptr<T>() + begin * options.top_k;
        task.chosen = out.experts.mutable_data_ptr<std::int64_t>() + begin * options.top_k;
        task.lse = out.lse.mutable_data_ptr<T>() + begin;
        task.bias = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
        task.logits_row = logits.stride(0);
        task.rows = end - begin;
        task.experts = experts;
        task.k = options.top_k;
        task.groups = options.groups;
        task.top_groups = options.top_groups;
        task.scale = options.scale;
        task.normalize = options.normalize;
        task.softmax = options.score == RouterScore::kSoftmax;
        std::vector<T> scratch(
            static_cast<std::size_t>(experts + 2 * options.groups + options.top_k));
        std::vector<std::int64_t> groups(static_cast<std::size_t>(options.top_groups));
        kernels::table<T>().route(task, scratch.data(), groups.data());
      });
  const T* const lse = out.lse.const_data_ptr<T>();
  for (std::int64_t i = 0; i < rows; ++i) {
    out.z_sum += static_cast<double>(lse[i]) * static_cast<double>(lse[i]);
  }
  return out;
}

/// Rows [begin, end) of the router's backward, all with the same further gradient.
template <class T>
void route_backward_rows(const at::Tensor& dweights, const RouterOutput& forward,
                         const RouterOptions& options, const T* extra, double z_weight,
                         const at::Tensor& dlogits, std::int64_t first, std::int64_t last) {
  const std::int64_t experts = forward.probabilities.size(1);
  kernels::for_rows(
      last - first, kernels::row_grain(4 * experts), [&](std::int64_t from, std::int64_t to) {
        const std::int64_t begin = first + from;
        kernels::RouteBackwardTask<T> task{};
        task.dweights = dweights.const_data_ptr<T>() + begin * dweights.stride(0);
        task.probabilities = forward.probabilities.const_data_ptr<T>() + begin * experts;
        task.weights = forward.weights.const_data_ptr<T>() + begin * options.top_k;
        task.chosen = forward.experts.const_data_ptr<std::int64_t>() + begin * options.top_k;
        task.lse = forward.lse.const_data_ptr<T>() + begin;
        task.extra = extra;
        task.dlogits = dlogits.mutable_data_ptr<T>() + begin * experts;
        task.dweights_row = dweights.stride(0);
        task.rows = to - from;
        task.experts = experts;
        task.k = options.top_k;
        task.scale = options.scale;
        task.z_weight = z_weight;
        task.normalize = options.normalize;
        task.softmax = options.score == RouterScore::kSoftmax;
        kernels::table<T>().route_backward(task);
      });
}

bool routing_served(const at::Tensor& dweights, const RouterOutput& forward, at::ScalarType dtype) {
  return dweights.scalar_type() == dtype &&
         kernels::served(dweights, forward.probabilities, forward.weights, forward.lse) &&
         forward.probabilities.is_contiguous() && forward.weights.is_contiguous() &&
         forward.experts.is_contiguous() && forward.lse.is_contiguous();
}

/// Row of each of `pairs` (token, choice) pairs in `source`, or -1.
std::vector<std::int64_t> rows_of_pairs(const at::Tensor& source, std::int64_t pairs,
                                        const char* where) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(pairs), -1);
  const at::Tensor order = source.contiguous();
  const auto* pair = order.const_data_ptr<std::int64_t>();
  for (std::int64_t r = 0; r < order.numel(); ++r) {
    MESHLOOM_CHECK(pair[r] >= 0 && pair[r] < pairs, where,
                   "source[" + std::to_string(r) + "] is " + std::to_string(pair[r]) +
                       ", expected less than " + std::to_string(pairs));
    rows[static_cast<std::size_t>(pair[r])] = r;
  }
  return rows;
}

/// Weighted (or plain) sums of the rows of each token.
template <class T>
at::Tensor combined_rows(const at::Tensor& from, const std::vector<std::int64_t>& rows,
                         const at::Tensor& weights, std::int64_t tokens, std::int64_t k) {
  const std::int64_t size = from.size(1);
  at::Tensor out = at::empty({tokens, size}, from.options());
  kernels::for_rows(tokens, kernels::row_grain(k * size),
                    [&](std::int64_t begin, std::int64_t end) {
                      kernels::CombineTask<T> task{};
                      task.from = from.const_data_ptr<T>();
                      task.from_row = from.stride(0);
                      task.row = rows.data() + begin * k;
                      if (weights.defined()) {
                        task.weights = weights.const_data_ptr<T>() + begin * weights.stride(0);
                        task.weights_row = weights.stride(0);
                      }
                      task.out = out.mutable_data_ptr<T>() + begin * size;
                      task.tokens = end - begin;
                      task.k = k;
                      task.size = size;
                      kernels::table<T>().combine(task);
                    });
  return out;
}

/// Rows index[r] / k of x.
template <class T>
at::Tensor copied_rows(const at::Tensor& x, const at::Tensor& index, std::int64_t k,
                       const char* where) {
  const std::int64_t size = x.size(1);
  at::Tensor out = at::empty({index.numel(), size}, x.options());
  const auto* from = index.const_data_ptr<std::int64_t>();
  for (std::int64_t r = 0; r < index.numel(); ++r) {
    MESHLOOM_CHECK(from[r] >= 0 && from[r] / k < x.size(0), where,
                   "index " + std::to_string(from[r]) + " of " + std::to_string(k * x.size(0)));
  }
  kernels::for_rows(
      index.numel(), kernels::row_grain(size), [&](std::int64_t begin, std::int64_t end) {
        T* const to = out.mutable_data_ptr<T>();
        for (std::int64_t r = begin; r < end; ++r) {
          std::copy_n(x.const_data_ptr<T>() + from[r] / k * x.stride(0), size, to + r * size);
        }
      });
  return out;
}

/// Every part of the vocabulary has its own task, so that rows are added in order of t.
template <class T>
void scatter_rows_(at::Tensor& grad, const at::Tensor& ids, const at::Tensor& dy) {
  constexpr std::int64_t kParts = 16;
  const auto* id = ids.const_data_ptr<std::int64_t>();
  for (std::int64_t t = 0; t < ids.numel(); ++t) {
    MESHLOOM_CHECK(id[t] >= 0 && id[t] < grad.size(0), "ops.embedding_backward_",
                   "id " + std::to_string(id[t]) + " of " + std::to_string(grad.size(0)));
  }
  kernels::for_tasks<T>(ids.numel() > 0 ? kParts : 0, 1, [&](std::int64_t part, T*) {
    for (std::int64_t t = 0; t < ids.numel(); ++t) {
      if (id[t] % kParts != part) continue;
      kernels::table<T>().add(grad.mutable_data_ptr<T>() + id[t] * grad.stride(0),
                              dy.const_data_ptr<T>() + t * dy.stride(0), dy.size(1));
    }
  });
}

}  // namespace

RouterOutput route(const at::Tensor& logits, const RouterOptions& options, const at::Tensor& bias) {
  constexpr const char* kWhere = "ops.route";
  check_shape(logits, {-1, -1}, kWhere, "logits");
  const std::int64_t experts = logits.size(1);
  MESHLOOM_CHECK_GE(options.top_k, 1, kWhere, "top_k");
  MESHLOOM_CHECK_GE(options.groups, 1, kWhere, "groups");
  MESHLOOM_CHECK_EQ(experts % options.groups, 0, kWhere, "experts modulo groups");
  MESHLOOM_CHECK_GE(options.top_groups, 1, kWhere, "top_groups");
  MESHLOOM_CHECK_LE(options.top_groups, options.groups, kWhere, "top_groups");
  if (options.groups > 1) {
    MESHLOOM_CHECK_GE(experts / options.groups, 2, kWhere, "experts of a group");
  }
  MESHLOOM_CHECK_LE(options.top_k, experts / options.groups * options.top_groups, kWhere,
                    "top_k, against the experts of the chosen groups");
  if (bias.defined()) check_shape(bias, {experts}, kWhere, "bias");
  if (kernels::served(logits)) {
    const at::Tensor added =
        bias.defined() ? bias.to(logits.scalar_type()).contiguous() : at::Tensor();
    return kernels::with_type(logits.scalar_type(), [&](auto number) {
      return route_rows<decltype(number)>(kernels::row_contiguous(logits), options, added);
    });
  }
  return composite::route(logits, options, bias);
}

at::Tensor normalized_probabilities(const RouterOutput& forward, const RouterOptions& options) {
  if (options.score == RouterScore::kSoftmax) return forward.probabilities;
  return forward.probabilities / forward.probabilities.sum({1}, true);
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
  if (routing_served(dweights, forward, dtype)) {
    if (z_weight != 0.0 && options.score == RouterScore::kSigmoid) {
      throw NotSupported(kWhere, "z-loss with sigmoid scores");
    }
    return kernels::with_type(dtype, [&](auto number) {
      using T = decltype(number);
      const at::Tensor dchosen = kernels::row_contiguous(dweights);
      at::Tensor dlogits = at::empty_like(forward.probabilities);
      const at::Tensor extra =
          dprobabilities.defined() ? dprobabilities.to(dtype).contiguous() : dprobabilities;
      const T* row = extra.defined() ? extra.const_data_ptr<T>() : nullptr;
      if (row == nullptr || group_rows.empty()) {
        route_backward_rows<T>(dchosen, forward, options, row, z_weight, dlogits, 0, tokens);
        return dlogits;
      }
      std::int64_t begin = 0;
      for (const std::int64_t count : group_rows) {
        route_backward_rows<T>(dchosen, forward, options, row, z_weight, dlogits, begin,
                               begin + count);
        begin += count;
        row += extra.size(1);
      }
      return dlogits;
    });
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
  if (kernels::served(x) && source.device().is_cpu()) {
    return kernels::with_type(x.scalar_type(), [&](auto number) {
      return copied_rows<decltype(number)>(kernels::row_contiguous(x), source.contiguous(), k,
                                           "ops.gather_rows");
    });
  }
  return composite::gather_rows(x, source, k);
}

at::Tensor gather_rows_backward(const at::Tensor& drows, const at::Tensor& source,
                                std::int64_t tokens, std::int64_t k) {
  check_shape(drows, {-1, -1}, "ops.gather_rows_backward", "drows");
  check_shape(source, {drows.size(0)}, "ops.gather_rows_backward", "source");
  MESHLOOM_CHECK_GE(k, 1, "ops.gather_rows_backward", "k");
  if (kernels::served(drows) && source.device().is_cpu()) {
    const auto rows = rows_of_pairs(source, tokens * k, "ops.gather_rows_backward");
    return kernels::with_type(drows.scalar_type(), [&](auto number) {
      return combined_rows<decltype(number)>(kernels::row_contiguous(drows), rows, {}, tokens, k);
    });
  }
  return composite::gather_rows_backward(drows, source, tokens, k);
}

at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& source, const at::Tensor& weights) {
  check_shape(y, {-1, -1}, "ops.combine_rows", "y");
  check_shape(source, {y.size(0)}, "ops.combine_rows", "source");
  check_shape(weights, {-1, -1}, "ops.combine_rows", "weights");
  if (kernels::served(y, weights) && source.device().is_cpu()) {
    const auto rows = rows_of_pairs(source, weights.numel(), "ops.combine_rows");
    return kernels::with_type(y.scalar_type(), [&](auto number) {
      return combined_rows<decltype(number)>(kernels::row_contiguous(y), rows,
                                             kernels::row_contiguous(weights), weights.size(0),
                                             weights.size(1));
    });
  }
  return composite::combine_rows(y, source, weights);
}

at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids) {
  check_shape(weight, {-1, -1}, "ops.embedding", "weight");
  check_shape(ids, {-1}, "ops.embedding", "ids");
  if (kernels::served(weight) && ids.device().is_cpu()) {
    return kernels::with_type(weight.scalar_type(), [&](auto number) {
      return copied_rows<decltype(number)>(kernels::row_contiguous(weight), ids.contiguous(), 1,
                                           "ops.embedding");
    });
  }
  return weight.index_select(0, ids);
}

void embedding_backward_(at::Tensor& grad, const at::Tensor& ids, const at::Tensor& dy) {
  check_shape(grad, {-1, -1}, "ops.embedding_backward_", "grad");
  check_shape(ids, {-1}, "ops.embedding_backward_", "ids");
  check_shape(dy, {ids.size(0), grad.size(1)}, "ops.embedding_backward_", "dy");
  if (kernels::served(grad, dy) && ids.device().is_cpu() &&
      (grad.stride(1) == 1 || grad.size(1) <= 1)) {
    return kernels::with_type(grad.scalar_type(), [&](auto number) {
      scatter_rows_<decltype(number)>(grad, ids.contiguous(), kernels::row_contiguous(dy));
    });
  }
  composite::embedding_backward_(grad, ids, dy);
}

}  // namespace meshloom::model::ops
