#pragma once

#include <cstdint>

#include "meshloom/core/export.h"
#include "meshloom/train/config.h"

namespace meshloom::train {

/// Factor on the learning rate at `step` (from 0), in [0, 1] for final fractions up to 1.
/// @param run_steps  the run's length, used where options.steps is 0
[[nodiscard]] MESHLOOM_API double schedule_factor(const ScheduleOptions& options, std::int64_t step,
                                                  std::int64_t run_steps);

}  // namespace meshloom::train
