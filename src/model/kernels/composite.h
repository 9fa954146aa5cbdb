#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "meshloom/model/attention_kernel.h"
#include "meshloom/model/ops.h"

/// Every operation out of ATen operators, on any device: what runs where no kernel of ours does,
/// and the oracle of the kernels' tests. Arguments were checked by the caller.
namespace meshloom::model::ops::composite {

/// fp64 for fp64, else fp32.
[[nodiscard]] at::ScalarType stat_type(at::ScalarType type);
[[nodiscard]] inline at::ScalarType stat_type(const at::Tensor& x) {
  return stat_type(x.scalar_type());
}

void matmul_nt_out(at::Tensor& y, const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias);
void matmul_nn_out(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w);
void matmul_nt_add_(at::Tensor& y, const at::Tensor& x, const at::Tensor& w);
void matmul_nn_add_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w);
void matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy, const at::Tensor& x);
at::Tensor column_sum(const at::Tensor& x);

NormOutput rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor rms_norm_backward_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& x,
                              const at::Tensor& weight, const at::Tensor& rstd);

RopeTables rope_tables(const at::Tensor& positions, const at::Tensor& inverse_frequencies,
                       double scaling);
void rope_(at::Tensor& qkv, const QkvLayout& layout, const RopeTables& tables);
at::Tensor rope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                         const RopeTables& tables, at::ScalarType dtype);
void rotate_(at::Tensor& x, const RopeTables& tables, bool interleaved, bool back);
QkOutput qk_norm_rope(const at::Tensor& qkv, const QkvLayout& layout, const at::Tensor& q_weight,
                      const at::Tensor& k_weight, double eps, const RopeTables& tables);
QkNormGradients qk_norm_rope_backward(const at::Tensor& dq, const at::Tensor& dk,
                                      const at::Tensor& dv, const at::Tensor& qkv,
                                      const at::Tensor& q_weight, const at::Tensor& k_weight,
                                      double eps, const RopeTables& tables);

at::Tensor swiglu(const at::Tensor& gate_up);
at::Tensor swiglu_backward_(at::Tensor& dy, at::Tensor& gate_up, const at::Tensor& weights);

RouterOutput route(const at::Tensor& logits, const RouterOptions& options, const at::Tensor& bias);
at::Tensor route_backward(const at::Tensor& dweights, const RouterOutput& forward,
                          const RouterOptions& options, const at::Tensor& dprobabilities,
                          std::span<const std::int64_t> group_rows, double z_weight,
                          at::ScalarType dtype);

ExpertOrder sort_by_expert(const at::Tensor& experts, std::int64_t expert_count);
at::Tensor gather_rows(const at::Tensor& x, const at::Tensor& source, std::int64_t k);
at::Tensor gather_rows_backward(const at::Tensor& drows, const at::Tensor& source,
                                std::int64_t tokens, std::int64_t k);
at::Tensor combine_rows(const at::Tensor& y, const at::Tensor& source, const at::Tensor& weights);

void embedding_backward_(at::Tensor& grad, const at::Tensor& ids, const at::Tensor& dy);

/// Sum of token losses of one chunk; with `scale` != 0 logits become scale * (softmax - one-hot).
/// @param logits [n, V], in place @param labels int64 [n], all valid.
double cross_entropy_rows_(at::Tensor& logits, const at::Tensor& labels, double scale);

void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v,
                        std::span<const AttentionBlock> blocks, const AttentionOptions& options);
void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& lse, const at::Tensor& delta,
                         std::span<const AttentionBlock> blocks, const AttentionOptions& options);

}  // namespace meshloom::model::ops::composite
