#include "meshloom/cost/memory_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

/// Division by a fraction may land a hair under the whole number it means.
constexpr double kRoundingSlack = 1e-12;
/// Of forward and backward.
constexpr double kForwardShare = 1.0 / 3.0;

}  // namespace

double MemoryModel::resident_fraction(double offload) const {
  if (layers <= 0 || resident_layers >= layers) return 1.0;
  const double movable = layers - resident_layers;
  return (resident_layers + (1.0 - offload) * movable) / layers;
}

std::int64_t MemoryModel::unit_capacity(std::int64_t capacity_tokens, int degree,
                                        double offload) const {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  if (capacity_tokens <= 0 || degree <= 0) return 0;
  if (capacity_tokens > kMost / degree) return kMost;
  const std::int64_t whole = capacity_tokens * degree;
  const double fraction = resident_fraction(offload);
  if (fraction >= 1.0) return whole;
  if (fraction <= 0.0) return kMost;
  const double held = static_cast<double>(whole) / fraction * (1.0 + kRoundingSlack);
  return held >= 0x1p63 ? kMost : static_cast<std::int64_t>(held);
}

std::optional<double> MemoryModel::offload_needed(std::int64_t capacity_tokens, int degree,
                                                  std::int64_t tokens) const {
  constexpr int kSteps = 1024;
  if (tokens <= unit_capacity(capacity_tokens, degree, 0.0)) return 0.0;
  if (tokens > unit_capacity(capacity_tokens, degree, 1.0)) return std::nullopt;
  int below = 0;  // does not hold
  int enough = kSteps;
  while (enough - below > 1) {
    const int middle = (below + enough) / 2;
    const double ratio = static_cast<double>(middle) / kSteps;
    (unit_capacity(capacity_tokens, degree, ratio) >= tokens ? enough : below) = middle;
  }
  return static_cast<double>(enough) / kSteps;
}

std::optional<int> MemoryModel::degree_needed(std::int64_t capacity_tokens, double offload,
                                              std::int64_t tokens, int most) const {
  if (most < 1 || tokens > unit_capacity(capacity_tokens, most, offload)) return std::nullopt;
  const double estimate = static_cast<double>(tokens) * resident_fraction(offload) /
                          static_cast<double>(capacity_tokens);
  int degree = std::clamp(static_cast<int>(std::min(estimate, 1.0 * most)), 1, most);
  while (degree < most && unit_capacity(capacity_tokens, degree, offload) < tokens) ++degree;
  while (degree > 1 && unit_capacity(capacity_tokens, degree - 1, offload) >= tokens) --degree;
  return degree;
}

double MemoryModel::most_hidden(const CostModel& cost, std::int64_t tokens) const {
  if (transfer <= 0.0 || tokens <= 0) return 1.0;
  const double forward = kForwardShare * cost.work(tokens);
  return std::min(1.0, forward / (transfer * static_cast<double>(tokens)));
}

void MemoryModel::validate() const {
  MESHLOOM_CHECK(layers >= 0, "cost.memory_model",
                 fmt::format("layers is {}, expected >= 0", layers));
  MESHLOOM_CHECK(resident_layers >= 0, "cost.memory_model",
                 fmt::format("resident_layers is {}, expected >= 0", resident_layers));
  MESHLOOM_CHECK(std::isfinite(transfer) && transfer >= 0.0, "cost.memory_model",
                 fmt::format("transfer is {}, expected a finite number >= 0", transfer));
}

}  // namespace meshloom
