#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "model/kernels/dispatch.h"

namespace meshloom::model::kernels {

// Depth of a slab of packed B, most elements of B packed at a time, and the tile of C that is one
// task: lower where there would be too few tasks for the threads.
inline constexpr std::int64_t kSlab = 256;
inline constexpr std::int64_t kPackedElements = std::int64_t{1} << 19;
inline constexpr std::int64_t kTaskRows = 192;
inline constexpr std::int64_t kLeastTaskRows = 48;
inline constexpr std::int64_t kTaskColumns = 256;
inline constexpr std::int64_t kTasksPerThread = 6;

/// Whether the packed product serves c (+)= a b: one type, on the CPU, nothing empty.
inline bool product_served(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  return served(c) && a.scalar_type() == c.scalar_type() && b.scalar_type() == c.scalar_type() &&
         a.device().is_cpu() && b.device().is_cpu() && c.numel() > 0 && a.numel() > 0 &&
         c.stride(1) == 1;
}

/// Columns [first_column, first_column + n) of the product.
template <class T>
void product_columns(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                     const T* bias, std::int64_t first_column, std::int64_t n, T* panels,
                     std::int64_t group) {
  const KernelTable<T>& kernels = table<T>();
  const std::int64_t m = c.size(0);
  const std::int64_t depth = a.size(1);
  const std::int64_t columns_up = (n + kernels.panel - 1) / kernels.panel * kernels.panel;
  const T* const a_data = a.const_data_ptr<T>();
  const T* const b_data = b.const_data_ptr<T>() + first_column * b.stride(1);
  T* const c_data = c.mutable_data_ptr<T>() + first_column;
  const std::int64_t across = (n + kTaskColumns - 1) / kTaskColumns;
  std::int64_t task_rows = kTaskRows;
  while (task_rows > kLeastTaskRows &&
         (m + task_rows - 1) / task_rows * across < kTasksPerThread * at::get_num_threads()) {
    task_rows /= 2;
  }
  const std::int64_t down = (m + task_rows - 1) / task_rows;
  for (std::int64_t first = 0; first < depth; first += group) {
    const std::int64_t deep = std::min(group, depth - first);
    // Slab after slab of panels; `at` is a row of this group.
    for_tasks<T>((deep + kSlab - 1) / kSlab * across, 1, [&](std::int64_t task, T*) {
      const std::int64_t at = task / across * kSlab;
      const std::int64_t column = task % across * kTaskColumns;
      const std::int64_t k = std::min(kSlab, deep - at);
      kernels.pack_b(b_data + (first + at) * b.stride(0) + column * b.stride(1), b.stride(0),
                     b.stride(1), k, std::min(kTaskColumns, n - column),
                     panels + at * columns_up + column * k);
    });
    for_tasks<T>(
        across * down, kernels.product_scratch * kSlab, [&](std::int64_t task, T* scratch) {
          const std::int64_t row = task / across * task_rows;
          const std::int64_t column = task % across * kTaskColumns;
          ProductTask<T> product{};
          product.a_row = a.stride(0);
          product.a_col = a.stride(1);
          product.c = c_data + row * c.stride(0) + column;
          product.c_row = c.stride(0);
          product.m = std::min(task_rows, m - row);
          product.n = std::min(kTaskColumns, n - column);
          for (std::int64_t at = 0; at < deep; at += kSlab) {
            product.a = a_data + row * a.stride(0) + (first + at) * a.stride(1);
            product.k = std::min(kSlab, deep - at);
            product.b = panels + at * columns_up + column * product.k;
            product.accumulate = accumulate || first + at > 0;
            product.bias =
                bias != nullptr && first + at == 0 ? bias + first_column + column : nullptr;
            kernels.product(product, scratch);
          }
        });
  }
}

template <class T>
void product_of(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                const T* bias) {
  constexpr std::int64_t kColumns = kPackedElements / kSlab;
  const std::int64_t n = c.size(1);
  const std::int64_t most = std::min(n, kColumns);
  const std::int64_t most_up = (most + kTaskColumns - 1) / kTaskColumns * kTaskColumns;
  const std::int64_t group = std::min(a.size(1), kPackedElements / most_up / kSlab * kSlab);
  const at::Tensor packed = at::empty({group * most_up}, c.options());
  for (std::int64_t column = 0; column < n; column += kColumns) {
    product_columns<T>(c, a, b, accumulate, bias, column, std::min(kColumns, n - column),
                       packed.mutable_data_ptr<T>(), group);
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
