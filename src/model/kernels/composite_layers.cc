#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>

#include "model/kernels/composite.h"

namespace meshloom::model::ops::composite {
namespace {

/// (x * cos -+ rotate_half(x) * sin) of the first R numbers of every head; sign -1 turns back.
at::Tensor rotate(const at::Tensor& heads, const RopeTables& tables, double sign) {
  const std::int64_t half = tables.cos.size(1);
  const at::Tensor cos = tables.cos.unsqueeze(1);
  const at::Tensor sin = tables.sin.unsqueeze(1) * sign;
  const at::Tensor low = heads.slice(2, 0, half);
  const at::Tensor high = heads.slice(2, half, 2 * half);
  return at::cat({low * cos - high * sin, high * cos + low * sin, heads.slice(2, 2 * half)}, 2);
}

at::Tensor heads_of(const at::Tensor& qkv, std::int64_t first, std::int64_t count,
                    std::int64_t head_dim) {
  return qkv.slice(1, first * head_dim, (first + count) * head_dim)
      .unflatten(1, {count, head_dim})
      .to(stat_type(qkv));
}

struct HeadNorm {
  at::Tensor dx;
  at::Tensor dweight;
};

/// Backward of y = w * (x * rstd) over the last dimension of [T, n, D], in stat.
HeadNorm norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& rstd) {
  const at::Tensor normed = x * rstd;
  const at::Tensor dnormed = dy * weight;
  const at::Tensor mean = (dnormed * normed).mean({-1}, true);
  return {(dnormed - normed * mean) * rstd, (dy * normed).flatten(0, -2).sum(0)};
}

at::Tensor rstd_of(const at::Tensor& x, double eps) {
  return at::rsqrt(x.square().mean({-1}, true) + eps);
}

}  // namespace

at::ScalarType stat_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

void matmul_nt_out(at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                   const at::Tensor& bias) {
  if (bias.defined()) {
    at::addmm_out(y, bias, x, w.t());
  } else {
    at::mm_out(y, x, w.t());
  }
}

void matmul_nn_out(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w) {
  at::mm_out(dx, dy, w);
}

void matmul_nt_add_(at::Tensor& y, const at::Tensor& x, const at::Tensor& w) { y.addmm_(x, w.t()); }

void matmul_nn_add_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w) { dx.addmm_(dy, w); }

void matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy, const at::Tensor& x) {
  if (grad.scalar_type() == dy.scalar_type()) {
    grad.addmm_(dy.t(), x);
  } else if (dy.is_cuda()) {
    grad.add_(at::mm(dy.t(), x));
  } else {
    grad.addmm_(dy.t().to(grad.scalar_type()), x.to(grad.scalar_type()));
  }
}

at::Tensor column_sum(const at::Tensor& x) { return x.sum({0}, false, stat_type(x)); }

NormOutput rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.to(stat_type(x));
  const at::Tensor rstd = rstd_of(wide, eps);
  return {weight * (wide * rstd).to(x.scalar_type()), rstd.squeeze(1)};
}

at::Tensor rms_norm_backward_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& x,
                              const at::Tensor& weight, const at::Tensor& rstd) {
  const at::ScalarType stat = stat_type(x);
  const HeadNorm gradient =
      norm_backward(dy.to(stat), x.to(stat), weight.to(stat), rstd.unsqueeze(1));
  dx.add_(gradient.dx);
  return gradient.dweight;
}

RopeTables rope_tables(const at::Tensor& positions, const at::Tensor& inverse_frequencies,
                       double scaling) {
  const at::Tensor angles =
      positions.to(inverse_frequencies.scalar_type()).unsqueeze(1) * inverse_frequencies;
  return {angles.cos() * scaling, angles.sin() * scaling};
}

void rope_(at::Tensor& qkv, const QkvLayout& layout, const RopeTables& tables) {
  const std::int64_t rotated = layout.heads + layout.kv_heads;
  qkv.slice(1, 0, rotated * layout.head_dim)
      .copy_(rotate(heads_of(qkv, 0, rotated, layout.head_dim), tables, 1.0).flatten(1));
}

at::Tensor rope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                         const RopeTables& tables, at::ScalarType dtype) {
  const at::ScalarType stat = stat_type(dtype);
  return at::cat(
             {rotate(dq.to(stat), tables, -1.0), rotate(dk.to(stat), tables, -1.0), dv.to(stat)}, 1)
      .flatten(1)
      .to(dtype);
}

void rotate_(at::Tensor& x, const RopeTables& tables, bool interleaved, bool back) {
  if (!interleaved) {
    x.copy_(rotate(x.to(stat_type(x)), tables, back ? -1.0 : 1.0));
    return;
  }
  const at::Tensor wide = x.to(stat_type(x));
  const at::Tensor even = wide.slice(2, 0, std::nullopt, 2);
  const at::Tensor odd = wide.slice(2, 1, std::nullopt, 2);
  const at::Tensor cos = tables.cos.unsqueeze(1);
  const at::Tensor sin = tables.sin.unsqueeze(1) * (back ? -1.0 : 1.0);
  const at::Tensor new_even = even * cos - odd * sin;
  const at::Tensor new_odd = odd * cos + even * sin;
  x.slice(2, 0, std::nullopt, 2).copy_(new_even);
  x.slice(2, 1, std::nullopt, 2).copy_(new_odd);
}

QkOutput qk_norm_rope(const at::Tensor& qkv, const QkvLayout& layout, const at::Tensor& q_weight,
                      const at::Tensor& k_weight, double eps, const RopeTables& tables) {
  const auto one = [&](std::int64_t first, std::int64_t count, const at::Tensor& weight) {
    const at::Tensor x = heads_of(qkv, first, count, layout.head_dim);
    const at::Tensor normed = weight * (x * rstd_of(x, eps)).to(qkv.scalar_type());
    return rotate(normed.to(x.scalar_type()), tables, 1.0).to(qkv.scalar_type());
  };
  return {one(0, layout.heads, q_weight), one(layout.heads, layout.kv_heads, k_weight)};
}

QkNormGradients qk_norm_rope_backward(const at::Tensor& dq, const at::Tensor& dk,
                                      const at::Tensor& dv, const at::Tensor& qkv,
                                      const at::Tensor& q_weight, const at::Tensor& k_weight,
                                      double eps, const RopeTables& tables) {
  const at::ScalarType stat = stat_type(qkv);
  const auto one = [&](std::int64_t first, const at::Tensor& dy, const at::Tensor& weight) {
    const at::Tensor x = heads_of(qkv, first, dy.size(1), dy.size(2));
    return norm_backward(rotate(dy.to(stat), tables, -1.0), x, weight.to(stat), rstd_of(x, eps));
  };
  const HeadNorm q = one(0, dq, q_weight);
  const HeadNorm k = one(dq.size(1), dk, k_weight);
  return {at::cat({q.dx, k.dx, dv.to(stat)}, 1).flatten(1).to(qkv.scalar_type()), q.dweight,
          k.dweight};
}

at::Tensor swiglu(const at::Tensor& gate_up) {
  const std::int64_t inner = gate_up.size(1) / 2;
  const at::Tensor gate = gate_up.slice(1, 0, inner).to(stat_type(gate_up));
  return (gate * at::sigmoid(gate)).to(gate_up.scalar_type()) * gate_up.slice(1, inner);
}

at::Tensor swiglu_backward_(at::Tensor& dy, at::Tensor& gate_up, const at::Tensor& weights) {
  const at::ScalarType stat = stat_type(gate_up);
  const std::int64_t inner = gate_up.size(1) / 2;
  const at::Tensor gate = gate_up.slice(1, 0, inner).to(stat);
  const at::Tensor up = gate_up.slice(1, inner).to(stat);
  const at::Tensor sigmoid = at::sigmoid(gate);
  const at::Tensor silu = gate * sigmoid;
  const at::Tensor wide = dy.to(stat);
  at::Tensor activation = silu * up;
  at::Tensor gradient =
      at::cat({wide * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), wide * silu}, 1);
  at::Tensor dweights;
  if (weights.defined()) {
    dweights = (wide * activation).sum(-1, false, weights.scalar_type());
    const at::Tensor scale = weights.unsqueeze(1).to(stat);
    activation.mul_(scale);
    gradient.mul_(scale);
  }
  gate_up.copy_(gradient);
  dy.copy_(activation);
  return dweights;
}

}  // namespace meshloom::model::ops::composite
