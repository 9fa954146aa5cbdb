#include "meshloom/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "meshloom/core/error.h"

namespace meshloom::train {

double schedule_factor(const ScheduleOptions& options, std::int64_t step, std::int64_t run_steps) {
  if (step < options.warmup) {
    return static_cast<double>(step + 1) / static_cast<double>(options.warmup + 1);
  }
  if (options.kind == "constant") return 1.0;
  const std::int64_t end = options.steps > 0 ? options.steps : run_steps;
  const double span = static_cast<double>(std::max<std::int64_t>(1, end - options.warmup));
  const double done = std::min(1.0, static_cast<double>(step - options.warmup) / span);
  const double rest = 1.0 - options.final_fraction;
  if (options.kind == "linear") return 1.0 - rest * done;
  if (options.kind == "cosine") {
    return options.final_fraction + rest * 0.5 * (1.0 + std::cos(std::numbers::pi * done));
  }
  throw InvalidArgument("train.schedule_factor", "unknown schedule \"" + options.kind + "\"");
}

}  // namespace meshloom::train
