#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "model/kernels/cpu_level.h"
#include "model/kernels/kernel_table.h"

namespace meshloom::model::kernels {

/// The kernels of the level in use. @pre active_level() is not kComposite.
template <class T>
const KernelTable<T>& table() {
  const auto pick = [](const KernelTable<float>& narrow,
                       const KernelTable<double>& wide) -> const KernelTable<T>& {
    if constexpr (sizeof(T) == sizeof(float)) {
      return narrow;
    } else {
      return wide;
    }
  };
#if defined(__x86_64__)
  switch (active_level()) {
    case CpuLevel::kAvx512:
      return pick(level_avx512::kTable32, level_avx512::kTable64);
    case CpuLevel::kAvx2:
      return pick(level_avx2::kTable32, level_avx2::kTable64);
    default:
      break;
  }
#endif
  return pick(level_baseline::kTable32, level_baseline::kTable64);
}

/// Calls body with a value of the C++ type of fp32 or fp64.
template <class Body>
auto with_type(at::ScalarType type, const Body& body) {
  return type == at::kDouble ? body(double{}) : body(float{});
}

/// Calls body(begin, end) on parts of [0, count): for work whose parts are independent of each
/// other, so that the result does not depend on where it is cut. `grain` is the least worth a
/// thread.
template <class Body>
void for_rows(std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  at::parallel_for(0, count, std::max<std::int64_t>(grain, 1), body);
}

/// Rows of `size` numbers that are worth a thread.
inline std::int64_t row_grain(std::int64_t size) {
  constexpr std::int64_t kGrain = 32768;
  return kGrain / std::max<std::int64_t>(size, 1);
}

/// Calls body(task, scratch) for every task; threads take the next one when they are done, so tasks
/// must be independent. Heavy tasks go first.
template <class T, class Body>
void for_tasks(std::int64_t count, std::int64_t scratch_elements, const Body& body) {
  if (count <= 0) return;
  std::atomic<std::int64_t> next{0};
  const std::int64_t workers = std::min<std::int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::Tensor scratch = at::empty(
        {scratch_elements}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
    T* const memory = scratch.mutable_data_ptr<T>();
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::int64_t task = next++; task < count; task = next++) body(task, memory);
    }
  });
}

/// Rows of reductions over tokens are summed in blocks of this size, then the blocks in order: the
/// same sum on any number of threads.
inline constexpr std::int64_t kReductionRows = 256;

/// Sums over rows: calls body(begin, end, partial) for blocks of rows, each with zeros [width] to
/// add to. @returns the sum of all partials, [width].
template <class T, class Body>
at::Tensor reduce_rows(std::int64_t rows, std::int64_t width, const Body& body) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const std::int64_t blocks =
      std::max<std::int64_t>((rows + kReductionRows - 1) / kReductionRows, 1);
  const at::Tensor partials = at::empty({blocks, width}, options);
  T* const data = partials.mutable_data_ptr<T>();
  std::fill_n(data, width, T{0});
  for_rows((rows + kReductionRows - 1) / kReductionRows, 1,
           [&](std::int64_t first, std::int64_t last) {
             for (std::int64_t block = first; block < last; ++block) {
               T* const partial = data + block * width;
               std::fill_n(partial, width, T{0});
               body(block * kReductionRows, std::min((block + 1) * kReductionRows, rows), partial);
             }
           });
  at::Tensor total = at::empty({width}, options);
  T* const to = total.mutable_data_ptr<T>();
  std::copy_n(data, width, to);
  for (std::int64_t block = 1; block < blocks; ++block) {
    table<T>().add(to, data + block * width, width);
  }
  return total;
}

}  // namespace meshloom::model::kernels
