#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "meshloom/core/export.h"
#include "meshloom/cost/cost_model.h"

namespace meshloom {

/// One unit as it was measured on one of its ranks.
struct UnitTiming {
  double square_sum = 0.0;  ///< of its samples' token counts, squared
  double token_sum = 0.0;   ///< of its samples' token counts
  int degree = 1;
  double seconds = 0.0;  ///< forward and backward, transfer that nothing hid included
};

/// A cost model and how well it explains the timings.
struct CostFit {
  CostModel model;
  double median_error = 0.0;  ///< relative, over all timings
  double worst_error = 0.0;   ///< relative, over timings that are not outliers
  int outliers = 0;           ///< timings further off than the fit believes
};

/// Fits the four coefficients to a profile: least squares on relative errors, no coefficient
/// negative, outliers weighted down (Huber). A coefficient that plays no part (exchange where every
/// unit has one rank) is zero.
/// @throws InvalidArgument  a timing is not positive and finite (names it), there are fewer than
///   the coefficients, or lengths are too alike to tell the coefficients apart (names them).
[[nodiscard]] MESHLOOM_API CostFit fit_cost(std::span<const UnitTiming> timings);

/// Follows measured unit times while training: recent units count most, outliers count little, and
/// what the units say nothing about stays near the model it began with. Plain data; the same units
/// in the same order give the same model. Not thread safe.
class MESHLOOM_API CostRefiner {
 public:
  /// @param horizon  units after which one counts 1/e.
  explicit CostRefiner(const CostModel& prior, double horizon = 512.0);

  /// @throws InvalidArgument  the timing is not positive and finite; nothing was changed.
  void add(const UnitTiming& timing);
  [[nodiscard]] const CostModel& model() const { return model_; }
  [[nodiscard]] std::int64_t units() const { return units_; }
  /// Typical relative error of the model on the units added lately.
  [[nodiscard]] double error() const { return scale_; }

  /// For checkpoints. @throws InvalidArgument  not a state that `to_json` wrote.
  [[nodiscard]] std::string to_json() const;
  [[nodiscard]] static CostRefiner from_json(std::string_view text);

  friend bool operator==(const CostRefiner&, const CostRefiner&) = default;

 private:
  void solve_();

  CostModel prior_;
  double horizon_ = 512.0;
  CostModel model_;
  std::int64_t units_ = 0;
  double scale_ = 0.1;
  std::array<double, 16> gram_{};   ///< of features over seconds, weighted
  std::array<double, 4> target_{};  ///< their sums
};

}  // namespace meshloom
