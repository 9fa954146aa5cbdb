#pragma once

#include <cstdint>
#include <span>

#include "meshloom/core/export.h"

namespace meshloom {

/// Work of one sample and time of one unit, in the units of the coefficients (plan-format `cost`).
/// A sample of s tokens is `quadratic * s^2 + linear * s` work; a unit on D ranks takes
/// `work / D + fixed + exchange * (D - 1) / D * tokens` on each of them.
struct MESHLOOM_API CostModel {
  double quadratic = 1.0;
  double linear = 24576.0;  ///< about a 7B model against quadratic = 1
  double fixed = 0.0;
  double exchange = 0.0;

  [[nodiscard]] double work(std::int64_t tokens) const {
    const auto s = static_cast<double>(tokens);
    return quadratic * s * s + linear * s;
  }
  [[nodiscard]] double unit_time(double unit_work, std::int64_t unit_tokens, int degree) const {
    return unit_work / degree + fixed +
           exchange * (degree - 1) / degree * static_cast<double>(unit_tokens);
  }

  /// @throws InvalidArgument  a coefficient is negative, not finite, or all work is zero.
  void validate() const;

  friend bool operator==(const CostModel&, const CostModel&) = default;
};

}  // namespace meshloom
