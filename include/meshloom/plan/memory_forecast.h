#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/cost/model_sizes.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// Everything the memory of a rank depends on, beside the step that it runs.
struct MESHLOOM_API MemorySetting {
  ModelSizes model;
  Layout layout;
  int zero = 1;                            ///< sharded over replicas, see docs/layouts.md
  std::string schedule{};                  ///< of the pipeline, by name
  std::vector<int> split{};                ///< decoder layers of each piece; empty: even
  std::string recompute = "none";          ///< none, selective, full
  std::int64_t element_bytes = 4;          ///< of parameters and activations: 2, 4 or 8
  std::int64_t bucket_elements = 8 << 20;  ///< as ModelPlacement's

  /// Of gradients, masters, moments and statistics.
  [[nodiscard]] std::int64_t wide_bytes() const { return element_bytes > 4 ? element_bytes : 4; }
  /// @throws InvalidArgument, NotSupported  names the field and what it may be.
  void validate() const;
};

/// What a byte is held for.
enum class MemoryPart : std::uint8_t {
  kParameters,
  kGradients,
  kMasters,
  kOptimizer,      ///< moments
  kZero,           ///< whole layers of what is sharded, summed gradients, updates on their way
  kStream,         ///< saved: residual stream, its norms, tokens
  kAttention,      ///< saved by attention layers
  kFeedForward,    ///< saved by dense layers and experts
  kWorkspace,      ///< of the layer that computes
  kLogits,         ///< chunks of logits and their gradient
  kExchange,       ///< keys and values on their way in a unit
  kCommunication,  ///< rows between tensor ranks and stages, tokens between experts, scratch
};
inline constexpr std::size_t kMemoryParts = 12;

[[nodiscard]] MESHLOOM_API std::string_view to_string(MemoryPart part);

/// What one rank holds when it holds most, in bytes of tensors.
struct MESHLOOM_API MemoryForecast {
  int rank = 0;
  std::array<std::int64_t, kMemoryParts> bytes{};  ///< by MemoryPart

  [[nodiscard]] std::int64_t of(MemoryPart part) const {
    return bytes[static_cast<std::size_t>(part)];
  }
  [[nodiscard]] std::int64_t total() const;
  /// Parameters, gradients, masters and moments: held whatever the data is.
  [[nodiscard]] std::int64_t states() const;
};

/// Parameters that the same ranks hold and sum together, as ModelPlacement::parts has them.
struct ParameterBlock {
  std::int64_t elements = 0;
  int replicas = 1;
  int zero = 1;
  int piece = 0;
  std::int64_t first_layer = 0;  ///< -1: embedding; layers(): final norm and head
  std::int64_t last_layer = 0;
  bool tied = false;
  friend bool operator==(const ParameterBlock&, const ParameterBlock&) = default;
};

/// What a world rank holds, in the order in which backward completes it.
[[nodiscard]] MESHLOOM_API std::vector<ParameterBlock> parameter_blocks(
    const MemorySetting& setting, int rank);

/// Most that `program` makes its rank hold: the program is run on sizes, tensor by tensor, as the
/// executor runs it on tensors. Experts are taken to be chosen evenly.
/// @throws InvalidArgument  the setting is malformed, or plan and program are not of its layout.
[[nodiscard]] MESHLOOM_API MemoryForecast forecast_memory(const MemorySetting& setting,
                                                          const StepPlan& plan,
                                                          const Program& program);

/// What bounds the steps of a run, in tokens.
struct StepLimits {
  std::int64_t capacity = 0;      ///< of one rank for one unit
  std::int64_t global_batch = 0;  ///< of a step
  std::int64_t longest_document = 0;
};

/// A step in which every rank's micro-batches are as full as the limits allow, as many as the
/// limits and the pipeline's depth allow, and units as wide as the longest document needs.
[[nodiscard]] MESHLOOM_API StepPlan fullest_step(const MemorySetting& setting,
                                                 const StepLimits& limits);

/// Of the first rank of every pipeline stage in the fullest step that the limits allow, [pp]. Other
/// ranks of a stage hold the same to rounding.
[[nodiscard]] MESHLOOM_API std::vector<MemoryForecast> forecast_memory(const MemorySetting& setting,
                                                                       const StepLimits& limits);

}  // namespace meshloom::plan
