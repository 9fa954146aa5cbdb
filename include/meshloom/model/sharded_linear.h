#pragma once

#include <ATen/core/Tensor.h>

#include "meshloom/core/export.h"
#include "meshloom/model/parameters.h"

namespace meshloom::model {

/// y = x W^T (+ b) whose weight may be split over ranks. `column`: the output features are split,
/// the input is whole (or its tokens are sharded, with sequence parallelism); `row`: the input
/// features are split and partial sums are reduced. The default is a single rank.
class MESHLOOM_API ShardedLinear {
 public:
  virtual ~ShardedLinear();
  virtual at::Tensor column(const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias) = 0;
  virtual at::Tensor row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) = 0;
  /// Input gradient of `column` / `row`: dy W.
  virtual at::Tensor column_backward(const at::Tensor& dy, const at::Tensor& weight) = 0;
  virtual at::Tensor row_backward(const at::Tensor& dy, const at::Tensor& weight) = 0;
};

class MESHLOOM_API LocalLinear final : public ShardedLinear {
 public:
  at::Tensor column(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  at::Tensor row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  at::Tensor column_backward(const at::Tensor& dy, const at::Tensor& weight) override;
  at::Tensor row_backward(const at::Tensor& dy, const at::Tensor& weight) override;
};

}  // namespace meshloom::model
