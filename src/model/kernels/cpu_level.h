#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace meshloom::model::kernels {

/// Instruction sets that the vector kernels are compiled for, each a superset of the one before.
enum class CpuLevel : std::uint8_t { kComposite, kBaseline, kAvx2, kAvx512 };

/// The level in use: the best of the machine under the cap of ops::set_cpu_level.
[[nodiscard]] CpuLevel active_level();

/// Whether kernels of ours serve this tensor: on the CPU, fp32 or fp64, not capped to composites.
[[nodiscard]] inline bool served(const at::Tensor& x) {
  return x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
         active_level() != CpuLevel::kComposite;
}

/// Whether kernels of ours serve all of them together: one type, `first` served.
template <class... Tensors>
[[nodiscard]] bool served(const at::Tensor& first, const Tensors&... others) {
  return served(first) &&
         ((others.device().is_cpu() && others.scalar_type() == first.scalar_type()) && ...);
}

}  // namespace meshloom::model::kernels
