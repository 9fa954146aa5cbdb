#include <ATen/ops/empty.h>

#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"
#include "model/kernels/dispatch.h"

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

using kernels::for_rows;
using kernels::row_contiguous;
using kernels::row_grain;
using kernels::served;
using kernels::table;
using kernels::with_type;

/// y and rstd of x, or of x + residual, which x becomes.
template <class T>
NormOutput norm_rows(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                     double eps) {
  const std::int64_t rows = x.size(0);
  NormOutput out{at::empty({rows, x.size(1)}, x.options()), at::empty({rows}, x.options())};
  const bool adds = residual.defined();
  for_rows(rows, row_grain(x.size(1)), [&](std::int64_t begin, std::int64_t end) {
    kernels::NormTask<T> task{};
    task.x = x.const_data_ptr<T>() + begin * x.stride(0);
    if (adds) {
      task.residual = residual.const_data_ptr<T>() + begin * residual.stride(0);
      task.sum = x.mutable_data_ptr<T>() + begin * x.stride(0);
      task.residual_row = residual.stride(0);
    }
    task.weight = weight.const_data_ptr<T>();
    task.y = out.y.mutable_data_ptr<T>() + begin * x.size(1);
    task.rstd = out.rstd.mutable_data_ptr<T>() + begin;
    task.x_row = x.stride(0);
    task.rows = end - begin;
    task.size = x.size(1);
    task.eps = eps;
    table<T>().norm(task);
  });
  return out;
}

template <class T>
at::Tensor norm_backward_rows(const at::Tensor& dx, const at::Tensor& dy, const at::Tensor& x,
                              const at::Tensor& weight, const at::Tensor& rstd) {
  return kernels::reduce_rows<T>(x.size(0), x.size(1),
                                 [&](std::int64_t begin, std::int64_t end, T* partial) {
                                   kernels::NormBackwardTask<T> task{};
                                   task.dx = dx.mutable_data_ptr<T>() + begin * dx.stride(0);
                                   task.dy = dy.const_data_ptr<T>() + begin * dy.stride(0);
                                   task.x = x.const_data_ptr<T>() + begin * x.stride(0);
                                   task.weight = weight.const_data_ptr<T>();
                                   task.rstd = rstd.const_data_ptr<T>() + begin;
                                   task.dweight = partial;
                                   task.dx_row = dx.stride(0);
                                   task.dy_row = dy.stride(0);
                                   task.x_row = x.stride(0);
                                   task.rows = end - begin;
                                   task.size = x.size(1);
                                   table<T>().norm_backward(task);
                                 });
}

bool even_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1; }

/// Everything of a task but its tensors.
template <class T>
kernels::HeadsTask<T> heads_task(const RopeTables& tables, std::int64_t begin, std::int64_t end,
                                 std::int64_t count, std::int64_t head_dim) {
  kernels::HeadsTask<T> task{};
  task.half = tables.cos.size(1);
  task.cos = tables.cos.const_data_ptr<T>() + begin * task.half;
  task.sin = tables.sin.const_data_ptr<T>() + begin * task.half;
  task.tokens = end - begin;
  task.heads = count;
  task.head_dim = head_dim;
  return task;
}

bool tables_served(const at::Tensor& x, const RopeTables& tables) {
  return served(x, tables.cos, tables.sin) && tables.cos.is_contiguous() &&
         tables.sin.is_contiguous();
}

template <class T>
void rope_rows_(at::Tensor& qkv, const QkvLayout& layout, const RopeTables& tables) {
  for_rows(qkv.size(0), row_grain(layout.width()), [&](std::int64_t begin, std::int64_t end) {
    auto task = heads_task<T>(tables, begin, end, layout.heads + layout.kv_heads, layout.head_dim);
    task.to = qkv.mutable_data_ptr<T>() + begin * qkv.stride(0);
    task.from = task.to;
    task.from_row = task.to_row = qkv.stride(0);
    task.from_head = task.to_head = layout.head_dim;
    table<T>().heads(task);
  });
}

template <class T>
void rotate_rows_(at::Tensor& x, const RopeTables& tables, bool interleaved, bool back) {
  for_rows(x.size(0), row_grain(x.size(1) * x.size(2)), [&](std::int64_t begin, std::int64_t end) {
    auto task = heads_task<T>(tables, begin, end, x.size(1), x.size(2));
    task.to = x.mutable_data_ptr<T>() + begin * x.stride(0);
    task.from = task.to;
    task.from_row = task.to_row = x.stride(0);
    task.from_head = task.to_head = x.stride(1);
    task.interleaved = interleaved;
    back ? table<T>().heads_backward(task) : table<T>().heads(task);
  });
}

/// Gradients of q or k heads; with the weight of the norm before the rotation, where there is one.
template <class T>
struct BackwardHeads {
  const at::Tensor& dheads;
  std::int64_t first;  ///< number of the first head in the fused row
  const T* weight;
  T* dweight;
};

/// One kind of head (q or k) of tokens [begin, end).
template <class T>
void backward_heads(const BackwardHeads<T>& heads, const at::Tensor& qkv, const at::Tensor& dqkv,
                    const RopeTables& tables, double eps, std::int64_t begin, std::int64_t end) {
  const at::Tensor& dheads = heads.dheads;
  const std::int64_t head_dim = dheads.size(2);
  auto task = heads_task<T>(tables, begin, end, dheads.size(1), head_dim);
  task.from = dheads.const_data_ptr<T>() + begin * dheads.stride(0);
  task.from_row = dheads.stride(0);
  task.from_head = dheads.stride(1);
  task.to = dqkv.mutable_data_ptr<T>() + begin * dqkv.stride(0) + heads.first * head_dim;
  task.to_row = dqkv.stride(0);
  task.to_head = head_dim;
  if (heads.weight != nullptr) {
    task.x = qkv.const_data_ptr<T>() + begin * qkv.stride(0) + heads.first * head_dim;
    task.x_row = qkv.stride(0);
    task.x_head = head_dim;
    task.weight = heads.weight;
    task.dweight = heads.dweight;
    task.eps = eps;
  }
  table<T>().heads_backward(task);
}

/// v's gradient moves to its place in the fused rows.
template <class T>
void copy_values(const at::Tensor& dv, const at::Tensor& dqkv, std::int64_t begin,
                 std::int64_t end) {
  const std::int64_t size = dv.size(1) * dv.size(2);
  for (std::int64_t t = begin; t < end; ++t) {
    T* to = dqkv.mutable_data_ptr<T>() + t * dqkv.stride(0) + dqkv.size(1) - size;
    for (std::int64_t h = 0; h < dv.size(1); ++h) {
      const T* from = dv.const_data_ptr<T>() + t * dv.stride(0) + h * dv.stride(1);
      std::copy_n(from, dv.size(2), to + h * dv.size(2));
    }
  }
}

template <class T>
QkOutput normed_heads(const at::Tensor& qkv, const QkvLayout& layout, const at::Tensor& q_weight,
                      const at::Tensor& k_weight, double eps, const RopeTables& tables) {
  const std::int64_t tokens = qkv.size(0);
  QkOutput out{at::empty({tokens, layout.heads, layout.head_dim}, qkv.options()),
               at::empty({tokens, layout.kv_heads, layout.head_dim}, qkv.options())};
  const auto one = [&](at::Tensor& to, std::int64_t first, const at::Tensor& weight,
                       std::int64_t begin, std::int64_t end) {
    auto task = heads_task<T>(tables, begin, end, to.size(1), layout.head_dim);
    task.from = qkv.const_data_ptr<T>() + begin * qkv.stride(0) + first * layout.head_dim;
    task.from_row = qkv.stride(0);
    task.from_head = task.to_head = layout.head_dim;
    task.to = to.mutable_data_ptr<T>() + begin * to.stride(0);
    task.to_row = to.stride(0);
    task.weight = weight.const_data_ptr<T>();
    task.eps = eps;
    table<T>().heads(task);
  };
  for_rows(tokens, row_grain(layout.width()), [&](std::int64_t begin, std::int64_t end) {
    one(out.q, 0, q_weight, begin, end);
    one(out.k, layout.heads, k_weight, begin, end);
  });
  return out;
}

template <class T>
at::Tensor swiglu_rows(const at::Tensor& gate_up) {
  const std::int64_t size = gate_up.size(1) / 2;
  at::Tensor out = at::empty({gate_up.size(0), size}, gate_up.options());
  for_rows(gate_up.size(0), row_grain(2 * size), [&](std::int64_t begin, std::int64_t end) {
    kernels::SwigluTask<T> task{};
    task.gate_up = gate_up.const_data_ptr<T>() + begin * gate_up.stride(0);
    task.out = out.mutable_data_ptr<T>() + begin * size;
    task.gate_up_row = gate_up.stride(0);
    task.rows = end - begin;
    task.size = size;
    table<T>().swiglu(task);
  });
  return out;
}

template <class T>
at::Tensor swiglu_backward_rows_(at::Tensor& dy, at::Tensor& gate_up, const at::Tensor& weights) {
  at::Tensor dweights;
  if (weights.defined()) dweights = at::empty({dy.size(0)}, weights.options());
  for_rows(dy.size(0), row_grain(2 * dy.size(1)), [&](std::int64_t begin, std::int64_t end) {
    kernels::SwigluBackwardTask<T> task{};
    task.dy = dy.mutable_data_ptr<T>() + begin * dy.stride(0);
    task.gate_up = gate_up.mutable_data_ptr<T>() + begin * gate_up.stride(0);
    if (weights.defined()) {
      task.weights = weights.const_data_ptr<T>() + begin;
      task.dweights = dweights.mutable_data_ptr<T>() + begin;
    }
    task.dy_row = dy.stride(0);
    task.gate_up_row = gate_up.stride(0);
    task.rows = end - begin;
    task.size = dy.size(1);
    table<T>().swiglu_backward(task);
  });
  return dweights;
}

}  // namespace

NormOutput rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_shape(x, {-1, -1}, "ops.rms_norm", "x");
  check_shape(weight, {x.size(1)}, "ops.rms_norm", "weight");
  if (served(x, weight)) {
    return with_type(x.scalar_type(), [&](auto number) {
      return norm_rows<decltype(number)>(row_contiguous(x), {}, weight.contiguous(), eps);
    });
  }
  return composite::rms_norm(x, weight, eps);
}

NormOutput add_rms_norm_(at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                         double eps) {
  check_shape(x, {-1, -1}, "ops.add_rms_norm_", "x");
  check_shape(residual, {x.size(0), x.size(1)}, "ops.add_rms_norm_", "residual");
  check_shape(weight, {x.size(1)}, "ops.add_rms_norm_", "weight");
  if (served(x, residual, weight) && even_rows(x)) {
    return with_type(x.scalar_type(), [&](auto number) {
      return norm_rows<decltype(number)>(x, row_contiguous(residual), weight.contiguous(), eps);
    });
  }
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
  if (served(x, dx, dy, weight, rstd) && even_rows(dx)) {
    return with_type(x.scalar_type(), [&](auto number) {
      return norm_backward_rows<decltype(number)>(dx, row_contiguous(dy), row_contiguous(x),
                                                  weight.contiguous(), rstd.contiguous());
    });
  }
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
  if (tables_served(qkv, tables) && even_rows(qkv)) {
    return with_type(qkv.scalar_type(),
                     [&](auto number) { rope_rows_<decltype(number)>(qkv, layout, tables); });
  }
  composite::rope_(qkv, layout, tables);
}

at::Tensor rope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                         const RopeTables& tables, at::ScalarType dtype) {
  check_heads(dq, dk, dv, "ops.rope_backward");
  check_tables(tables, dq.size(0), dq.size(2), "ops.rope_backward");
  if (tables_served(dq, tables) && served(dq, dk, dv) && dq.scalar_type() == dtype &&
      even_rows(dq) && even_rows(dk) && even_rows(dv)) {
    at::Tensor dqkv =
        at::empty({dq.size(0), (dq.size(1) + 2 * dk.size(1)) * dq.size(2)}, dq.options());
    with_type(dtype, [&](auto number) {
      using T = decltype(number);
      for_rows(dq.size(0), row_grain(dqkv.size(1)), [&](std::int64_t begin, std::int64_t end) {
        backward_heads<T>({dq, 0, nullptr, nullptr}, dqkv, dqkv, tables, 0.0, begin, end);
        backward_heads<T>({dk, dq.size(1), nullptr, nullptr}, dqkv, dqkv, tables, 0.0, begin, end);
        copy_values<T>(dv, dqkv, begin, end);
      });
    });
    return dqkv;
  }
  return composite::rope_backward(dq, dk, dv, tables, dtype);
}

void rotate_(at::Tensor& x, const RopeTables& tables, bool interleaved, bool back) {
  check_shape(x, {-1, -1, 2 * tables.cos.size(1)}, "ops.rotate_", "x");
  check_tables(tables, x.size(0), x.size(2), "ops.rotate_");
  if (tables_served(x, tables) && x.stride(2) == 1) {
    with_type(x.scalar_type(),
              [&](auto number) { rotate_rows_<decltype(number)>(x, tables, interleaved, back); });
    return;
  }
  composite::rotate_(x, tables, interleaved, back);
}

QkOutput qk_norm_rope(const at::Tensor& qkv, const QkvLayout& layout, const at::Tensor& q_weight,
                      const at::Tensor& k_weight, double eps, const RopeTables& tables) {
  constexpr const char* kWhere = "ops.qk_norm_rope";
  check_shape(qkv, {-1, layout.width()}, kWhere, "qkv");
  check_shape(q_weight, {layout.head_dim}, kWhere, "q_weight");
  check_shape(k_weight, {layout.head_dim}, kWhere, "k_weight");
  check_tables(tables, qkv.size(0), layout.head_dim, kWhere);
  if (tables_served(qkv, tables) && served(qkv, q_weight, k_weight)) {
    return with_type(qkv.scalar_type(), [&](auto number) {
      return normed_heads<decltype(number)>(row_contiguous(qkv), layout, q_weight.contiguous(),
                                            k_weight.contiguous(), eps, tables);
    });
  }
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
  if (tables_served(qkv, tables) && served(qkv, q_weight, k_weight, dq, dk, dv) && even_rows(dq) &&
      even_rows(dk) && even_rows(dv)) {
    return with_type(qkv.scalar_type(), [&](auto number) {
      using T = decltype(number);
      const std::int64_t head_dim = dq.size(2);
      const at::Tensor rows = row_contiguous(qkv);
      const at::Tensor q_factor = q_weight.contiguous();
      const at::Tensor k_factor = k_weight.contiguous();
      QkNormGradients out;
      out.dqkv = at::empty({rows.size(0), rows.size(1)}, rows.options());
      const at::Tensor dweights = kernels::reduce_rows<T>(
          rows.size(0), 2 * head_dim, [&](std::int64_t begin, std::int64_t end, T* partial) {
            backward_heads<T>({dq, 0, q_factor.const_data_ptr<T>(), partial}, rows, out.dqkv,
                              tables, eps, begin, end);
            backward_heads<T>({dk, dq.size(1), k_factor.const_data_ptr<T>(), partial + head_dim},
                              rows, out.dqkv, tables, eps, begin, end);
            copy_values<T>(dv, out.dqkv, begin, end);
          });
      out.q_weight = dweights.narrow(0, 0, head_dim);
      out.k_weight = dweights.narrow(0, head_dim, head_dim);
      return out;
    });
  }
  return composite::qk_norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, eps, tables);
}

at::Tensor swiglu(const at::Tensor& gate_up) {
  check_shape(gate_up, {-1, -1}, "ops.swiglu", "gate_up");
  MESHLOOM_CHECK_EQ(gate_up.size(1) % 2, 0, "ops.swiglu", "columns of gate_up modulo 2");
  if (served(gate_up)) {
    return with_type(gate_up.scalar_type(), [&](auto number) {
      return swiglu_rows<decltype(number)>(row_contiguous(gate_up));
    });
  }
  return composite::swiglu(gate_up);
}

at::Tensor swiglu_backward_(at::Tensor& dy, at::Tensor& gate_up, const at::Tensor& weights) {
  constexpr const char* kWhere = "ops.swiglu_backward_";
  check_shape(dy, {-1, -1}, kWhere, "dy");
  check_shape(gate_up, {dy.size(0), 2 * dy.size(1)}, kWhere, "gate_up");
  if (weights.defined()) check_shape(weights, {dy.size(0)}, kWhere, "weights");
  if (served(dy, gate_up, weights.defined() ? weights : dy) && even_rows(dy) &&
      even_rows(gate_up)) {
    return with_type(dy.scalar_type(), [&](auto number) {
      return swiglu_backward_rows_<decltype(number)>(
          dy, gate_up, weights.defined() ? weights.contiguous() : weights);
    });
  }
  return composite::swiglu_backward_(dy, gate_up, weights);
}

}  // namespace meshloom::model::ops
