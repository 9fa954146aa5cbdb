#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

/// Tokens sorted by expert, for the experts this rank holds.
struct DispatchedTokens {
  at::Tensor rows;  ///< [R, hidden], sorted by expert; undefined once dropped, see keeps_rows()
  std::vector<std::int64_t> expert_rows;  ///< [local experts], sums to R
  /// int64: the dispatcher's own notes, saved for backward. LocalDispatcher: [R], t * k + j of the
  /// (token, choice) pair of each row.
  at::Tensor source;
};

/// Which layer's experts tokens go to.
struct ExpertLayer {
  std::int64_t layer = 0;    ///< decoder layer
  std::int64_t experts = 0;  ///< that it has
};

/// What combine leaves for the experts' backward.
struct CombineGradients {
  at::Tensor rows;     ///< [R, hidden]: dout of each row's token, not yet weighted
  at::Tensor weights;  ///< [R]: the router's weight of each row
};

/// What dispatch hands back to the router's rank.
struct DispatchGradients {
  at::Tensor x;        ///< [T, hidden]: sum over the token's rows, in order of j
  at::Tensor weights;  ///< [T, k]
};

/// A result that may still be on its way: called once, it waits for it.
template <class Result>
using Arrival = std::function<Result()>;

/// Brings tokens to their experts and results back; dropless. The default is a single rank that
/// holds all experts. An instance belongs to one micro-batch; its ranks call it in the same order.
/// Experts' outputs are never saved: since a row's weight w scales y = act W^T, the gradient of w
/// is (dout W) . act, which backward has at hand where the expert lives.
class MESHLOOM_API TokenDispatcher {
 public:
  virtual ~TokenDispatcher();

  /// @param x        [T, hidden]
  /// @param experts  int64 [T, k], chosen experts of each token
  virtual DispatchedTokens dispatch(const at::Tensor& x, const at::Tensor& experts,
                                    ExpertLayer of) = 0;
  /// Starts `dispatch` and returns while rows travel. The arguments stay as they are until the
  /// arrival. By default the result is there at once.
  virtual Arrival<DispatchedTokens> begin_dispatch(const at::Tensor& x, const at::Tensor& experts,
                                                   ExpertLayer of);
  /// Whether backward wants DispatchedTokens::rows saved (they came over the network). If not, it
  /// asks `rows_again`.
  [[nodiscard]] virtual bool keeps_rows() const = 0;
  /// The rows of `dispatch` once more, from the same x. Only called if !keeps_rows().
  virtual at::Tensor rows_again(const at::Tensor& x, const DispatchedTokens& routing,
                                std::int64_t experts_per_token) = 0;
  /// out[t] = sum_j weights[t, j] * y[row of (t, j)], summed in order of j.
  /// @param y  [R, hidden] @param weights  [T, k]
  virtual at::Tensor combine(const at::Tensor& y, const DispatchedTokens& routing,
                             const at::Tensor& weights) = 0;
  /// @param dout  [T, hidden]
  virtual CombineGradients combine_backward(const at::Tensor& dout, const DispatchedTokens& routing,
                                            const at::Tensor& weights) = 0;
  /// Starts `combine_backward`, likewise.
  virtual Arrival<CombineGradients> begin_combine_backward(const at::Tensor& dout,
                                                           const DispatchedTokens& routing,
                                                           const at::Tensor& weights);
  /// @param drows  [R, hidden] @param dweights  [R], of the router's weights
  virtual DispatchGradients dispatch_backward(const at::Tensor& drows, const at::Tensor& dweights,
                                              const DispatchedTokens& routing, std::int64_t tokens,
                                              std::int64_t experts_per_token) = 0;
};

class MESHLOOM_API LocalDispatcher final : public TokenDispatcher {
 public:
  DispatchedTokens dispatch(const at::Tensor& x, const at::Tensor& experts,
                            ExpertLayer of) override;
  [[nodiscard]] bool keeps_rows() const override { return false; }
  at::Tensor rows_again(const at::Tensor& x, const DispatchedTokens& routing,
                        std::int64_t experts_per_token) override;
  at::Tensor combine(const at::Tensor& y, const DispatchedTokens& routing,
                     const at::Tensor& weights) override;
  CombineGradients combine_backward(const at::Tensor& dout, const DispatchedTokens& routing,
                                    const at::Tensor& weights) override;
  DispatchGradients dispatch_backward(const at::Tensor& drows, const at::Tensor& dweights,
                                      const DispatchedTokens& routing, std::int64_t tokens,
                                      std::int64_t experts_per_token) override;
};

}  // namespace meshloom::model
