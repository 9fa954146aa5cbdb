#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/memory_forecast.h"

namespace meshloom::plan {

/// One way to hold less.
struct MemoryChange {
  std::string setting;     ///< as config.yaml says it, e.g. "parallel.recompute: full"
  std::int64_t bytes = 0;  ///< of the fullest rank then
};

/// Forecast of the fullest stage.
[[nodiscard]] MESHLOOM_API MemoryForecast fullest(const MemorySetting& setting,
                                                  const StepLimits& limits);

/// What would make the fullest rank hold at most `most_bytes` on as many ranks: each change of one
/// setting that does by itself; or, where none does, the settings that together hold least. In that
/// case its `bytes` say whether even that fits.
[[nodiscard]] MESHLOOM_API std::vector<MemoryChange> memory_changes(const MemorySetting& setting,
                                                                    const StepLimits& limits,
                                                                    std::int64_t most_bytes);

}  // namespace meshloom::plan
