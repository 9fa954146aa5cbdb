#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"

namespace meshloom::model {

struct AttentionOptions {
  double scale = 1.0;
  std::int64_t window = 0;  ///< tokens a query sees, itself included; 0: all before it
};

struct AttentionOutput {
  at::Tensor out;  ///< [T, Hq, Dv], dtype of q
  at::Tensor lse;  ///< [Hq, T], natural log of the sum of exp, fp32 (fp64 for fp64 inputs)
};

struct AttentionGradients {
  at::Tensor dq;  ///< [T, Hq, D]
  at::Tensor dk;  ///< [T, Hkv, D]
  at::Tensor dv;  ///< [T, Hkv, Dv]
};

/// Causal attention of a batch whose documents may be spread over the ranks of a unit. The seam
/// between the model, which knows nothing of ranks, and the engines that move keys and values.
/// An instance belongs to one unit; every rank of the unit calls it in the same order.
class MESHLOOM_API AttentionExchange {
 public:
  virtual ~AttentionExchange();

  /// @param q  [T, Hq, D] @param k  [T, Hkv, D] @param v  [T, Hkv, Dv], Hkv divides Hq; any row and
  ///   head stride, the last dimension contiguous.
  virtual AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const SequenceBatch& batch, const AttentionOptions& options) = 0;

  /// @param forward  what forward returned for the same inputs.
  virtual AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                      const at::Tensor& k, const at::Tensor& v,
                                      const AttentionOutput& forward, const SequenceBatch& batch,
                                      const AttentionOptions& options) = 0;
};

/// The single-rank default: every document is whole, nothing moves.
class MESHLOOM_API LocalAttention final : public AttentionExchange {
 public:
  AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const SequenceBatch& batch, const AttentionOptions& options) override;
  AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& v, const AttentionOutput& forward,
                              const SequenceBatch& batch, const AttentionOptions& options) override;
};

}  // namespace meshloom::model
