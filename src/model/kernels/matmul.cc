#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "meshloom/model/ops.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"
#include "model/kernels/product_driver.h"

namespace meshloom::model::ops {
namespace {

void check_product(const at::Tensor& rows, const at::Tensor& w, std::int64_t inner_dim,
                   const char* where) {
  kernels::check_shape(rows, {-1, w.size(inner_dim)}, where, "rows");
  kernels::check_type(rows, w.scalar_type(), where, "rows");
}

/// Calls visit(e, first row, rows) for every expert that has rows.
template <class Visit>
void for_each_group(std::span<const std::int64_t> rows, const Visit& visit) {
  std::int64_t begin = 0;
  for (std::size_t e = 0; e < rows.size(); ++e) {
    if (rows[e] > 0) visit(static_cast<std::int64_t>(e), begin, rows[e]);
    begin += rows[e];
  }
}

}  // namespace

void matmul_nt_out(at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                   const at::Tensor& bias) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nt", "w");
  check_product(x, w, 1, "ops.matmul_nt");
  kernels::check_shape(y, {x.size(0), w.size(0)}, "ops.matmul_nt", "y");
  if (bias.defined()) kernels::check_shape(bias, {w.size(0)}, "ops.matmul_nt", "bias");
  if (kernels::product_served(y, x, w) &&
      (!bias.defined() || bias.scalar_type() == x.scalar_type())) {
    kernels::product_(y, x, w.t(), false, bias);
    return;
  }
  composite::matmul_nt_out(y, x, w, bias);
}

at::Tensor matmul_nt(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nt", "w");
  at::Tensor y = at::empty({x.size(0), w.size(0)}, x.options());
  matmul_nt_out(y, x, w, bias);
  return y;
}

void matmul_nn_out(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nn", "w");
  check_product(dy, w, 0, "ops.matmul_nn");
  kernels::check_shape(dx, {dy.size(0), w.size(1)}, "ops.matmul_nn", "dx");
  if (kernels::product_served(dx, dy, w)) return kernels::product_(dx, dy, w, false);
  composite::matmul_nn_out(dx, dy, w);
}

at::Tensor matmul_nn(const at::Tensor& dy, const at::Tensor& w) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nn", "w");
  at::Tensor dx = at::empty({dy.size(0), w.size(1)}, dy.options());
  matmul_nn_out(dx, dy, w);
  return dx;
}

void matmul_nt_add_(at::Tensor& y, const at::Tensor& x, const at::Tensor& w) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nt_add_", "w");
  check_product(x, w, 1, "ops.matmul_nt_add_");
  kernels::check_shape(y, {x.size(0), w.size(0)}, "ops.matmul_nt_add_", "y");
  if (kernels::product_served(y, x, w)) return kernels::product_(y, x, w.t(), true);
  composite::matmul_nt_add_(y, x, w);
}

void matmul_nn_add_(at::Tensor& dx, const at::Tensor& dy, const at::Tensor& w) {
  kernels::check_shape(w, {-1, -1}, "ops.matmul_nn_add_", "w");
  check_product(dy, w, 0, "ops.matmul_nn_add_");
  kernels::check_shape(dx, {dy.size(0), w.size(1)}, "ops.matmul_nn_add_", "dx");
  if (kernels::product_served(dx, dy, w)) return kernels::product_(dx, dy, w, true);
  composite::matmul_nn_add_(dx, dy, w);
}

void matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy, const at::Tensor& x) {
  kernels::check_shape(dy, {-1, -1}, "ops.matmul_tn_add_", "dy");
  kernels::check_shape(x, {dy.size(0), -1}, "ops.matmul_tn_add_", "x");
  kernels::check_type(x, dy.scalar_type(), "ops.matmul_tn_add_", "x");
  kernels::check_shape(grad, {dy.size(1), x.size(1)}, "ops.matmul_tn_add_", "grad");
  if (kernels::product_served(grad, dy, x)) return kernels::product_(grad, dy.t(), x, true);
  composite::matmul_tn_add_(grad, dy, x);
}

at::Tensor grouped_matmul_nt(const at::Tensor& x, const at::Tensor& w,
                             std::span<const std::int64_t> rows) {
  constexpr const char* kWhere = "ops.grouped_matmul_nt";
  kernels::check_shape(w, {static_cast<std::int64_t>(rows.size()), -1, -1}, kWhere, "w");
  check_product(x, w, 2, kWhere);
  kernels::check_rows(rows, x.size(0), kWhere);
  at::Tensor y = at::empty({x.size(0), w.size(1)}, x.options());
  for_each_group(rows, [&](std::int64_t e, std::int64_t begin, std::int64_t count) {
    at::Tensor out = y.narrow(0, begin, count);
    const at::Tensor in = x.narrow(0, begin, count);
    if (kernels::product_served(out, in, w)) {
      kernels::product_(out, in, w.select(0, e).t(), false);
    } else {
      at::mm_out(out, in, w.select(0, e).t());
    }
  });
  return y;
}

at::Tensor grouped_matmul_nn(const at::Tensor& dy, const at::Tensor& w,
                             std::span<const std::int64_t> rows) {
  constexpr const char* kWhere = "ops.grouped_matmul_nn";
  kernels::check_shape(w, {static_cast<std::int64_t>(rows.size()), -1, -1}, kWhere, "w");
  check_product(dy, w, 1, kWhere);
  kernels::check_rows(rows, dy.size(0), kWhere);
  at::Tensor dx = at::empty({dy.size(0), w.size(2)}, dy.options());
  for_each_group(rows, [&](std::int64_t e, std::int64_t begin, std::int64_t count) {
    at::Tensor out = dx.narrow(0, begin, count);
    const at::Tensor in = dy.narrow(0, begin, count);
    if (kernels::product_served(out, in, w)) {
      kernels::product_(out, in, w.select(0, e), false);
    } else {
      at::mm_out(out, in, w.select(0, e));
    }
  });
  return dx;
}

void grouped_matmul_tn_add_(at::Tensor& grad, const at::Tensor& dy, const at::Tensor& x,
                            std::span<const std::int64_t> rows) {
  constexpr const char* kWhere = "ops.grouped_matmul_tn_add_";
  kernels::check_shape(dy, {-1, -1}, kWhere, "dy");
  kernels::check_shape(x, {dy.size(0), -1}, kWhere, "x");
  kernels::check_shape(grad, {static_cast<std::int64_t>(rows.size()), dy.size(1), x.size(1)},
                       kWhere, "grad");
  kernels::check_rows(rows, x.size(0), kWhere);
  for_each_group(rows, [&](std::int64_t e, std::int64_t begin, std::int64_t count) {
    at::Tensor out = grad.select(0, e);
    const at::Tensor left = dy.narrow(0, begin, count);
    const at::Tensor right = x.narrow(0, begin, count);
    if (kernels::product_served(out, left, right)) {
      kernels::product_(out, left.t(), right, true);
    } else {
      composite::matmul_tn_add_(out, left, right);
    }
  });
}

at::Tensor column_sum(const at::Tensor& x) {
  kernels::check_shape(x, {-1, -1}, "ops.column_sum", "x");
  return composite::column_sum(x);
}

}  // namespace meshloom::model::ops
