#include <fmt/format.h>

#include "meshloom/core/check.h"
#include "meshloom/model/ops.h"
#include "meshloom/model/parameters.h"

namespace meshloom::model {
namespace {

/// The part of a flat buffer that a handle names.
at::Tensor flat_view(const at::Tensor& flat, const ParameterHandle& handle) {
  MESHLOOM_CHECK(handle.offset >= 0, "model.flat_parameters", "an absent parameter was asked for");
  MESHLOOM_CHECK(flat.defined(), "model.flat_parameters", "there is no gradient buffer");
  std::int64_t count = 1;
  for (const std::int64_t extent : handle.shape) count *= extent;
  return flat.narrow(0, handle.offset, count).view(handle.shape);
}

}  // namespace

FlatParameters::FlatParameters(at::Tensor values, at::Tensor gradients)
    : values_(std::move(values)), gradients_(std::move(gradients)) {
  MESHLOOM_CHECK(values_.defined() && values_.dim() == 1 && values_.is_contiguous(),
                 "model.flat_parameters", "values must be one contiguous dimension");
  if (gradients_.defined()) {
    MESHLOOM_CHECK_EQ(gradients_.numel(), values_.numel(), "model.flat_parameters",
                      "elements of gradients");
  }
}

at::Tensor FlatParameters::acquire(const ParameterHandle& handle) {
  return flat_view(values_, handle);
}

void FlatParameters::release(const ParameterHandle& /*handle*/) {}

void FlatParameters::linear(const ParameterHandle& handle, const at::Tensor& dy,
                            const at::Tensor& x) {
  at::Tensor grad = flat_view(gradients_, handle);
  ops::matmul_tn_add_(grad, dy, x);
}

void FlatParameters::grouped_linear(const ParameterHandle& handle, const at::Tensor& dy,
                                    const at::Tensor& x, const std::vector<std::int64_t>& rows) {
  at::Tensor grad = flat_view(gradients_, handle);
  ops::grouped_matmul_tn_add_(grad, dy, x, rows);
}

void FlatParameters::embedding(const ParameterHandle& handle, const at::Tensor& ids,
                               const at::Tensor& dy) {
  at::Tensor grad = flat_view(gradients_, handle);
  ops::embedding_backward_(grad, ids, dy);
}

void FlatParameters::add(const ParameterHandle& handle, const at::Tensor& value) {
  flat_view(gradients_, handle).add_(value);
}

}  // namespace meshloom::model
