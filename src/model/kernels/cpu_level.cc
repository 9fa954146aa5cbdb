#include "model/kernels/cpu_level.h"

#include <array>
#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/model/ops.h"

namespace meshloom::model {
namespace kernels {
namespace {

constexpr std::array<std::string_view, 4> kLevelNames = {"composite", "baseline", "avx2", "avx512"};

CpuLevel best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return CpuLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kBaseline;
}

// What the machine can do is a fact of the process, and so is its cap.
std::atomic<CpuLevel>& level_in_use() {
  static std::atomic<CpuLevel> level{best_level()};
  return level;
}

}  // namespace

CpuLevel active_level() { return level_in_use().load(std::memory_order_relaxed); }

}  // namespace kernels

namespace ops {

void set_cpu_level(std::string_view level) {
  const kernels::CpuLevel best = kernels::best_level();
  if (level.empty()) {
    kernels::level_in_use() = best;
    return;
  }
  for (std::size_t i = 0; i < kernels::kLevelNames.size(); ++i) {
    if (kernels::kLevelNames[i] == level) {
      kernels::level_in_use() = std::min(static_cast<kernels::CpuLevel>(i), best);
      return;
    }
  }
  throw InvalidArgument("ops.set_cpu_level", "\"" + std::string(level) +
                                                 "\" is not composite, baseline, avx2 or avx512");
}

std::string cpu_level() {
  return std::string(kernels::kLevelNames[static_cast<std::size_t>(kernels::active_level())]);
}

std::vector<std::string> cpu_levels() {
  std::vector<std::string> names;
  for (std::size_t i = 0; i <= static_cast<std::size_t>(kernels::best_level()); ++i) {
    names.emplace_back(kernels::kLevelNames[i]);
  }
  return names;
}

}  // namespace ops
}  // namespace meshloom::model
