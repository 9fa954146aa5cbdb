#include <ATen/ops/empty.h>

#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"

namespace meshloom::model::ops {
namespace {

using kernels::check_shape;
using kernels::check_type;

void check_tables(const RopeTables& tables, std::int64_t tokens, std::int64_t head_dim,
                  const char* where) {
  check_shape(tables.cos, {tokens, -1}, where, "cos");
  check_shape(tables.sin, {tokens, tables.cos.size(1)}, where, "sin");
  MESHLOOM_CHECK_LE(2 * tables.cos.size(1), head_dim, where, "rotated numbers of a head");
}

void check_heads(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                 const char* where) {
  check_shape(dq, {-1, -1, -1}, where, "dq");
  check_shape(dk, {dq.size(0), -1, dq.size(2)}, where, "dk");
  check_shape(dv, {dq.size(0), dk.size(1), dq.size(2)}, where, "dv");
}

}  // namespace

NormOutput rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_shape(x, {-1, -1}, "ops.rms_norm", "x");
  check_shape(weight, {x.size(1)}, "ops.rms_norm", "weight");
  return composite::rms_norm(x, weight, eps);
}

NormOutput add_rms_norm_(at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                         double eps) {
  check_shape(x, {-1, -1}, "ops.add_rms_norm_", "x");
  check_shape(residual, {x.size(0), x.size(1)}, "ops.add_rms_norm_", "residual");
  check_shape(weight, {x.size(1)}, "ops.add_rms_norm_", "weight");
  x.add_(residual);
  return composite::rms_norm(x, weight, eps);
}

at::Tensor rms_norm_backward_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& x,
                              const at::Tensor& weight, const at::Tensor& rstd) {
  constexpr const char* kWhere = "ops.rms_norm_backward_";
  check_shape(x, {-1, -1}, kWhere, "x");
  check_shape(dx, {x.size(0), x.size(1)}, kWhere, "dx");
  check_shape(dy, {x.size(0), x.size(1)}, kWhere, "dy");
  check_shape(weight, {x.size(1)}, kWhere, "weight");
  check_shape(rstd, {x.size(0)}, kWhere, "rstd");
  return composite::rms_norm_backward_(dx, dy, x, weight, rstd);
}

RopeTables rope_tables(const at::Tensor& positions, const at::Tensor& inverse_frequencies,
                       double scaling) {
  check_shape(positions, {-1}, "ops.rope_tables", "positions");
  check_shape(inverse_frequencies, {-1}, "ops.rope_tables", "inverse_frequencies");
  return composite::rope_tables(positions, inverse_frequencies, scaling);
}

void rope_(at::Tensor& qkv, const QkvLayout& layout, const RopeTables& tables) {
  check_shape(qkv, {-1, layout.width()}, "ops.rope_", "qkv");
  check_tables(tables, qkv.size(0), layout.head_dim, "ops.rope_");
  composite::rope_(qkv, layout, tables);
}

at::Tensor rope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                         const RopeTables& tables, at::ScalarType dtype) {
  check_heads(dq, dk, dv, "ops.rope_backward");
  check_tables(tables, dq.size(0), dq.size(2), "ops.rope_backward");
  return composite::rope_backward(dq, dk, dv, tables, dtype);
}

QkOutput qk_norm_rope(const at::Tensor& qkv, const QkvLayout& layout, const at::Tensor& q_weight,
                      const at::Tensor& k_weight, double eps, const RopeTables& tables) {
  constexpr const char* kWhere = "ops.qk_norm_rope";
  check_shape(qkv, {-1, layout.width()}, kWhere, "qkv");
  check_shape(q_weight, {layout.head_dim}, kWhere, "q_weight");
  check_shape(k_weight, {layout.head_dim}, kWhere, "k_weight");
  check_tables(tables, qkv.size(0), layout.head_dim, kWhere);
  return composite::qk_norm_rope(qkv, layout, q_weight, k_weight, eps, tables);
}

QkNormGradients qk_norm_rope_backward(const at::Tensor& dq, const at::Tensor& dk,
                                      const at::Tensor& dv, const at::Tensor& qkv,
                                      const at::Tensor& q_weight, const at::Tensor& k_weight,
                                      double eps, const RopeTables& tables) {
  constexpr const char* kWhere = "ops.qk_norm_rope_backward";
  check_heads(dq, dk, dv, kWhere);
  check_shape(qkv, {dq.size(0), (dq.size(1) + 2 * dk.size(1)) * dq.size(2)}, kWhere, "qkv");
  check_shape(q_weight, {dq.size(2)}, kWhere, "q_weight");
  check_shape(k_weight, {dq.size(2)}, kWhere, "k_weight");
  check_tables(tables, dq.size(0), dq.size(2), kWhere);
  return composite::qk_norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, eps, tables);
}

at::Tensor swiglu(const at::Tensor& gate_up) {
  check_shape(gate_up, {-1, -1}, "ops.swiglu", "gate_up");
  MESHLOOM_CHECK_EQ(gate_up.size(1) % 2, 0, "ops.swiglu", "columns of gate_up modulo 2");
  return composite::swiglu(gate_up);
}

SwigluGradients swiglu_backward(const at::Tensor& dy, const at::Tensor& gate_up) {
  check_shape(dy, {-1, -1}, "ops.swiglu_backward", "dy");
  check_shape(gate_up, {dy.size(0), 2 * dy.size(1)}, "ops.swiglu_backward", "gate_up");
  return composite::swiglu_backward(dy, gate_up);
}

}  // namespace meshloom::model::ops
