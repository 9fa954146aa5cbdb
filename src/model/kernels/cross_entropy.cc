#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "meshloom/model/batch.h"
#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"
#include "model/kernels/dispatch.h"
#include "model/kernels/product_driver.h"

namespace meshloom::model::ops {
namespace {

constexpr std::int64_t kChunkBytes = std::int64_t{16} << 20;  // of logits
constexpr std::int64_t kMinimumRows = 64;

/// Loss of one chunk, whose logits become their gradients.
double chunk_loss_(at::Tensor& logits, const at::Tensor& labels, double scale) {
  if (kernels::served(logits)) {
    const at::Tensor targets = labels.contiguous();
    std::vector<double> losses(static_cast<std::size_t>(logits.size(0)));
    kernels::with_type(logits.scalar_type(), [&](auto number) {
      using T = decltype(number);
      kernels::for_rows(logits.size(0), kernels::row_grain(4 * logits.size(1)),
                        [&](std::int64_t begin, std::int64_t end) {
                          kernels::CrossEntropyTask<T> task{};
                          task.logits = logits.mutable_data_ptr<T>() + begin * logits.stride(0);
                          task.labels = targets.const_data_ptr<std::int64_t>() + begin;
                          task.losses = losses.data() + begin;
                          task.logits_row = logits.stride(0);
                          task.rows = end - begin;
                          task.vocabulary = logits.size(1);
                          task.scale = scale;
                          kernels::table<T>().cross_entropy(task);
                        });
    });
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }
  return composite::cross_entropy_rows_(logits, labels, scale);
}

/// out = a b.
void product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (kernels::product_served(out, a, b)) return kernels::product_(out, a, b, false);
  at::mm_out(out, a, b);
}

CrossEntropyOutput run(const char* where, const at::Tensor& hidden, const at::Tensor& weight,
                       const at::Tensor& labels, double loss_weight,
                       const LogitGradientSink* sink) {
  kernels::check_shape(weight, {-1, -1}, where, "weight");
  kernels::check_shape(hidden, {-1, weight.size(1)}, where, "hidden");
  kernels::check_shape(labels, {hidden.size(0)}, where, "labels");
  kernels::check_type(hidden, weight.scalar_type(), where, "hidden");
  kernels::check_type(labels, at::kLong, where, "labels");
  CrossEntropyOutput out;
  if (sink != nullptr) out.dhidden = at::zeros_like(hidden);
  const at::Tensor targets = at::nonzero(labels != kIgnoreLabel).squeeze(1);
  out.tokens = targets.numel();
  if (out.tokens == 0) return out;
  const bool all = out.tokens == hidden.size(0);
  const at::Tensor chosen = all ? labels : labels.index_select(0, targets);
  const auto low = chosen.min().item<std::int64_t>();
  const auto high = chosen.max().item<std::int64_t>();
  MESHLOOM_CHECK(low >= 0 && high < weight.size(0), where,
                 "labels go from " + std::to_string(low) + " to " + std::to_string(high) +
                     ", the vocabulary has " + std::to_string(weight.size(0)) + " entries");
  const std::int64_t row_bytes = weight.size(0) * weight.element_size();
  const std::int64_t chunk = std::min(
      out.tokens, std::max(kMinimumRows, kChunkBytes / std::max<std::int64_t>(row_bytes, 1)));
  at::Tensor buffer = at::empty({chunk, weight.size(0)}, hidden.options());
  for (std::int64_t begin = 0; begin < out.tokens; begin += chunk) {
    const std::int64_t rows = std::min(chunk, out.tokens - begin);
    const at::Tensor index = targets.narrow(0, begin, rows);
    const at::Tensor x = all ? hidden.narrow(0, begin, rows) : hidden.index_select(0, index);
    // A sink that kept the last chunk owns it now.
    if (!buffer.defined()) buffer = at::empty({chunk, weight.size(0)}, hidden.options());
    at::Tensor logits = buffer.narrow(0, 0, rows);
    product_into(logits, x, weight.t());
    out.loss_sum +=
        chunk_loss_(logits, chosen.narrow(0, begin, rows), sink != nullptr ? loss_weight : 0.0);
    if (sink == nullptr) continue;
    if (all) {
      at::Tensor dx = out.dhidden.narrow(0, begin, rows);
      product_into(dx, logits, weight);
    } else {
      at::Tensor dx = at::empty({rows, weight.size(1)}, hidden.options());
      product_into(dx, logits, weight);
      out.dhidden.index_copy_(0, index, dx);
    }
    (*sink)(logits, x);
    logits.reset();
    if (buffer.storage().use_count() > 1) buffer.reset();
  }
  return out;
}

}  // namespace

CrossEntropyOutput linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                        const at::Tensor& labels, double loss_weight,
                                        const LogitGradientSink& weight_gradient) {
  MESHLOOM_CHECK(static_cast<bool>(weight_gradient), "ops.linear_cross_entropy",
                 "no sink for the weight gradient");
  return run("ops.linear_cross_entropy", hidden, weight, labels, loss_weight, &weight_gradient);
}

CrossEntropyOutput linear_cross_entropy_loss(const at::Tensor& hidden, const at::Tensor& weight,
                                             const at::Tensor& labels) {
  return run("ops.linear_cross_entropy_loss", hidden, weight, labels, 0.0, nullptr);
}

}  // namespace meshloom::model::ops
