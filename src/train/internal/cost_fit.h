#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "meshloom/cost/cost_model.h"

namespace meshloom::train::detail {

/// One unit as it ran.
struct UnitObservation {
  double square_sum = 0.0;  ///< of token counts squared, over samples
  double token_sum = 0.0;
  int degree = 1;
  double busy_seconds = 0.0;  ///< forward and backward of one rank, waiting excluded
  double wait_seconds = 0.0;  ///< of the member that waited least: transfer that nothing hid
};

/// Keeps a cost model in step with measured unit times: least squares on relative errors over the
/// newest units, coefficients not negative, outliers weighted down. Not thread safe.
class CostFit {
 public:
  /// @param prior  what to plan with until there is enough to fit
  explicit CostFit(const CostModel& prior) : model_(prior) {}

  void add(const UnitObservation& observation);
  /// Refits; the model is unchanged where the observations do not determine one.
  void refit();
  [[nodiscard]] const CostModel& model() const { return model_; }

 private:
  CostModel model_;
  std::deque<UnitObservation> observations_;
};

}  // namespace meshloom::train::detail
