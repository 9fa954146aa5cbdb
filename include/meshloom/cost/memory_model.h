#pragma once

#include <cstdint>

#include "meshloom/core/export.h"

namespace meshloom {

/// What the offload rule needs (plan-format `memory`): a unit with ratio r holds
/// `resident_layers + (1 - r) * (layers - resident_layers)` of `layers` layers' activations.
struct MESHLOOM_API MemoryModel {
  int layers = 0;  ///< 0: no offload is possible
  int resident_layers = 2;

  /// Fraction of a unit's activations held on the device at ratio r, in (0, 1].
  [[nodiscard]] double resident_fraction(double offload) const;

  /// Most tokens a unit of `degree` ranks may hold: floor(degree * capacity / resident_fraction).
  [[nodiscard]] std::int64_t unit_capacity(std::int64_t capacity_tokens, int degree,
                                           double offload) const;

  friend bool operator==(const MemoryModel&, const MemoryModel&) = default;
};

}  // namespace meshloom
