#pragma once

#include <ATen/core/Tensor.h>

#include "model/kernels/dispatch.h"

namespace meshloom::model::kernels {

// Depth of a slab of packed B, and the tile of C that is one task.
inline constexpr std::int64_t kSlab = 256;
inline constexpr std::int64_t kTaskRows = 192;
inline constexpr std::int64_t kTaskColumns = 256;
inline constexpr std::int64_t kPackColumns = 256;

/// Whether the packed product serves c (+)= a b: one type, on the CPU, nothing empty.
inline bool product_served(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  return served(c) && a.scalar_type() == c.scalar_type() && b.scalar_type() == c.scalar_type() &&
         a.device().is_cpu() && b.device().is_cpu() && c.numel() > 0 && a.numel() > 0 &&
         c.stride(1) == 1;
}

template <class T>
void product_of(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                const T* bias) {
  const KernelTable<T>& kernels = table<T>();
  const std::int64_t m = c.size(0);
  const std::int64_t n = c.size(1);
  const std::int64_t depth = a.size(1);
  const std::int64_t columns_up = (n + kernels.panel - 1) / kernels.panel * kernels.panel;
  const at::Tensor packed = at::empty({std::min(depth, kSlab) * columns_up}, c.options());
  T* const panels = packed.mutable_data_ptr<T>();
  const T* const a_data = a.const_data_ptr<T>();
  const T* const b_data = b.const_data_ptr<T>();
  T* const c_data = c.mutable_data_ptr<T>();
  const std::int64_t across = (n + kTaskColumns - 1) / kTaskColumns;
  const std::int64_t down = (m + kTaskRows - 1) / kTaskRows;
  for (std::int64_t first = 0; first < depth; first += kSlab) {
    const std::int64_t k = std::min(kSlab, depth - first);
    for_tasks<T>((n + kPackColumns - 1) / kPackColumns, 1, [&](std::int64_t task, T*) {
      const std::int64_t column = task * kPackColumns;
      kernels.pack_b(b_data + first * b.stride(0) + column * b.stride(1), b.stride(0), b.stride(1),
                     k, std::min(kPackColumns, n - column), panels + column * k);
    });
    for_tasks<T>(across * down, kernels.product_scratch * k, [&](std::int64_t task, T* scratch) {
      const std::int64_t row = task / across * kTaskRows;
      const std::int64_t column = task % across * kTaskColumns;
      ProductTask<T> product{};
      product.a = a_data + row * a.stride(0) + first * a.stride(1);
      product.a_row = a.stride(0);
      product.a_col = a.stride(1);
      product.b = panels + column * k;
      product.c = c_data + row * c.stride(0) + column;
      product.c_row = c.stride(0);
      product.m = std::min(kTaskRows, m - row);
      product.n = std::min(kTaskColumns, n - column);
      product.k = k;
      product.accumulate = accumulate || first > 0;
      product.bias = bias != nullptr && first == 0 ? bias + column : nullptr;
      kernels.product(product, scratch);
    });
  }
}

/// c = a b or c += a b (+ bias), a [m, k] and b [k, n] of any strides. The order of summation is
/// fixed by the shape. @pre product_served(c, a, b).
inline void product_(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                     const at::Tensor& bias = {}) {
  with_type(c.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const at::Tensor row = bias.defined() ? bias.contiguous() : bias;
    product_of<T>(c, a, b, accumulate, row.defined() ? row.const_data_ptr<T>() : nullptr);
  });
}

}  // namespace meshloom::model::kernels
