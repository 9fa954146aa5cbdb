#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::parallel {

/// The documents behind a plan's samples: token ids, and which of them are targets.
struct SampleTokens {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint8_t> loss_mask;  ///< empty: all; entry 0 is ignored
};

/// @param sample  id in the plan
using SampleLoader = std::function<SampleTokens(std::int64_t sample)>;

/// Member `index`'s share of a unit: slices as DESIGN.md (Plan 9) cuts them, labels shifted before
/// slicing.
/// @param load  none: positions and documents alone, for a stage without embedding or head
/// @param vocabulary  0: unknown
/// @throws DataError  a document's length or number of targets is not what the plan says, or a
/// token
///   lies outside the vocabulary; names the sample.
[[nodiscard]] MESHLOOM_API model::SequenceBatch build_batch(const plan::StepPlan& plan,
                                                            const plan::Unit& unit, int index,
                                                            const SampleLoader& load,
                                                            c10::Device device,
                                                            std::int64_t vocabulary = 0);

/// Tokens that member `index` of a unit holds.
[[nodiscard]] MESHLOOM_API std::int64_t member_tokens(const plan::StepPlan& plan,
                                                      const plan::Unit& unit, int index);

/// A batch of no tokens: what an idle member of a lockstep group runs.
[[nodiscard]] MESHLOOM_API model::SequenceBatch empty_batch(c10::Device device);

}  // namespace meshloom::parallel
