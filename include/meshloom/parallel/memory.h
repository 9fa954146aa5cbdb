#pragma once

#include <cstdint>
#include <string>

#include "meshloom/core/export.h"
#include "meshloom/cost/model_sizes.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/plan/memory_forecast.h"

namespace meshloom::parallel {

[[nodiscard]] MESHLOOM_API ModelSizes model_sizes(const model::ModelConfig& config);

/// What a memory forecast of a placement depends on.
/// @param schedule       of the pipeline, by name, as the placement was made with
/// @param recompute      none, selective, full
/// @param element_bytes  of parameters and activations
[[nodiscard]] MESHLOOM_API plan::MemorySetting memory_setting(const ModelPlacement& placement,
                                                              const std::string& schedule,
                                                              const std::string& recompute,
                                                              std::int64_t element_bytes);

}  // namespace meshloom::parallel
