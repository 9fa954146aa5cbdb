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

struct KeysAndValues {
  at::Tensor k;  ///< [R, H, D]
  at::Tensor v;  ///< [R, H, Dv]
};

/// Keys and values that are made from fewer numbers a token, as multi-head latent attention makes
/// them [DeepSeek-V2, 2405.04434, 2.1]: what an exchange may move in their stead.
class MESHLOOM_API LatentKeys {
 public:
  virtual ~LatentKeys();
  /// [T, n] of the own tokens.
  [[nodiscard]] virtual const at::Tensor& rows() const = 0;
  /// @param rows  [R, n] of any tokens of the unit
  [[nodiscard]] virtual KeysAndValues expand(const at::Tensor& rows) const = 0;
  /// Adds the gradients of the weights that `expand` reads to where they belong.
  /// @param rows  what `expand` was given; may be kept, so it must not be overwritten
  /// @param dk, dv  gradients of what it returned, any float dtype
  /// @returns the gradient of `rows`, [R, n]
  [[nodiscard]] virtual at::Tensor contract(const at::Tensor& rows, const at::Tensor& dk,
                                            const at::Tensor& dv) = 0;
};

struct LatentGradients {
  at::Tensor dq;     ///< [T, Hq, D]
  at::Tensor drows;  ///< [T, n]
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

  /// The same where keys and values are made from latents. By default a rank makes those of its own
  /// tokens, and they are what moves; an exchange that moves latents overrides both.
  virtual AttentionOutput forward_latent(const at::Tensor& q, const LatentKeys& keys,
                                         const SequenceBatch& batch,
                                         const AttentionOptions& options);
  virtual LatentGradients backward_latent(const at::Tensor& dout, const at::Tensor& q,
                                          LatentKeys& keys, const AttentionOutput& forward,
                                          const SequenceBatch& batch,
                                          const AttentionOptions& options);
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
