#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

/// Tokens sorted by expert, for the experts this rank holds.
struct DispatchedTokens {
  at::Tensor rows;                        ///< [R, hidden], sorted by expert
  std::vector<std::int64_t> expert_rows;  ///< [local experts], sums to R
  at::Tensor source;  ///< int64 [R]: t * k + j of the (token, choice) pair of each row
};

/// Brings tokens to their experts and results back; dropless. The default is a single rank that
/// holds all experts. An instance belongs to one micro-batch; its ranks call it in the same order.
class MESHLOOM_API TokenDispatcher {
 public:
  virtual ~TokenDispatcher();

  /// @param x        [T, hidden]
  /// @param experts  int64 [T, k], chosen experts of each token
  virtual DispatchedTokens dispatch(const at::Tensor& x, const at::Tensor& experts,
                                    std::int64_t expert_count) = 0;
  /// out[t] = sum_j weights[t, j] * y[row of (t, j)], summed in order of j.
  /// @param y  [R, hidden] @param weights  [T, k]
  virtual at::Tensor combine(const at::Tensor& y, const DispatchedTokens& routing,
                             const at::Tensor& weights) = 0;
  /// Gradients of combine: dy [R, hidden] and dweights [T, k].
  virtual std::pair<at::Tensor, at::Tensor> combine_backward(const at::Tensor& dout,
                                                             const at::Tensor& y,
                                                             const DispatchedTokens& routing,
                                                             const at::Tensor& weights) = 0;
  /// Gradient of dispatch: dx [T, hidden] = sum over the token's rows, in order of j.
  virtual at::Tensor dispatch_backward(const at::Tensor& drows, const DispatchedTokens& routing,
                                       std::int64_t tokens, std::int64_t experts_per_token) = 0;
};

class MESHLOOM_API LocalDispatcher final : public TokenDispatcher {
 public:
  DispatchedTokens dispatch(const at::Tensor& x, const at::Tensor& experts,
                            std::int64_t expert_count) override;
  at::Tensor combine(const at::Tensor& y, const DispatchedTokens& routing,
                     const at::Tensor& weights) override;
  std::pair<at::Tensor, at::Tensor> combine_backward(const at::Tensor& dout, const at::Tensor& y,
                                                     const DispatchedTokens& routing,
                                                     const at::Tensor& weights) override;
  at::Tensor dispatch_backward(const at::Tensor& drows, const DispatchedTokens& routing,
                               std::int64_t tokens, std::int64_t experts_per_token) override;
};

}  // namespace meshloom::model
