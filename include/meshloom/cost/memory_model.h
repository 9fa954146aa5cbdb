#pragma once

#include <cstdint>
#include <optional>

#include "meshloom/core/export.h"
#include "meshloom/cost/cost_model.h"

namespace meshloom {

/// What the offload rule needs (plan-format `memory`): a unit with ratio r holds
/// `resident_layers + (1 - r) * (layers - resident_layers)` of `layers` layers' activations.
struct MESHLOOM_API MemoryModel {
  int layers = 0;  ///< 0: no offload is possible
  int resident_layers = 2;
  /// Time, in the cost model's units, to move one token's activations of all layers to host memory,
  /// by the slower of the two directions; 0: never more than computation hides.
  double transfer = 0.0;

  /// Fraction of a unit's activations held on the device at ratio r, in (0, 1].
  [[nodiscard]] double resident_fraction(double offload) const;

  /// Most tokens a unit of `degree` ranks may hold: floor(degree * capacity / resident_fraction).
  [[nodiscard]] std::int64_t unit_capacity(std::int64_t capacity_tokens, int degree,
                                           double offload) const;

  /// The smallest ratio, in steps of 1/1024, at which a unit of `degree` ranks holds `tokens`;
  /// empty where even ratio 1 does not.
  [[nodiscard]] std::optional<double> offload_needed(std::int64_t capacity_tokens, int degree,
                                                     std::int64_t tokens) const;

  /// The fewest ranks, at most `most`, that hold `tokens` at a given ratio; empty where none do.
  [[nodiscard]] std::optional<int> degree_needed(std::int64_t capacity_tokens, double offload,
                                                 std::int64_t tokens, int most) const;

  /// The largest ratio whose transfer the forward of a sample of `tokens` hides: r_max of
  /// [BS 5.1], the same on any number of ranks, in 0 .. 1.
  [[nodiscard]] double most_hidden(const CostModel& cost, std::int64_t tokens) const;

  /// @throws InvalidArgument  a count is negative, or `transfer` negative or not finite.
  void validate() const;

  friend bool operator==(const MemoryModel&, const MemoryModel&) = default;
};

}  // namespace meshloom
