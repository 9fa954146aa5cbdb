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

}  // namespace meshloom::model::kernels
