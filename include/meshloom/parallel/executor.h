#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/model/stage.h"
#include "meshloom/parallel/zero1.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::parallel {

/// One span of a rank's time, for timelines and cost fitting.
struct Span {
  enum class Kind : std::uint8_t { kLoad, kForward, kBackward, kExchange, kWait, kReduce, kStep };
  Kind kind = Kind::kForward;
  std::chrono::nanoseconds begin{};  ///< since the step began on this rank
  std::chrono::nanoseconds end{};
  int slot = -1;
  int unit = -1;
};
[[nodiscard]] MESHLOOM_API const char* to_string(Span::Kind kind);

/// What one rank knows after running its program.
struct StepOutcome {
  double loss_sum = 0.0;    ///< token losses of this rank's micro-batches, unweighted
  double z_loss_sum = 0.0;
  std::int64_t tokens = 0;  ///< processed by this rank
  std::vector<Span> spans;
};

/// Gives the documents of a sample: token ids and which of them are targets.
struct SampleTokens {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint8_t> loss_mask;  ///< empty: all
};
using SampleLoader = std::function<SampleTokens(std::int64_t sample_id)>;

/// This rank's share of a unit: slices as DESIGN.md cuts them, labels shifted before slicing.
/// @param index  position of this rank in unit.ranks
[[nodiscard]] MESHLOOM_API model::SequenceBatch build_batch(const plan::StepPlan& plan,
                                                            const plan::Unit& unit, int index,
                                                            const SampleLoader& load,
                                                            at::Device device);

struct ExecutorOptions {
  double aux_loss_coefficient = 0.0;
  double z_loss_coefficient = 0.0;
  bool record_spans = true;
  /// Called between instructions, e.g. to notice a signal; may throw.
  std::function<void()> between;
};

/// Interpreter of Programs on tensors, for one rank. Backward and forward of micro-batches run
/// here; the optimizer update is the caller's (`on_step`).
class MESHLOOM_API Executor {
 public:
  /// @param hdp  communicator over the HDP axis; outlives the executor's calls.
  Executor(std::shared_ptr<model::Stage> stage, comm::Communicator hdp, ExecutorOptions options);
  ~Executor();

  /// Runs `program` of `plan`. Collective over the HDP axis. Gradients accumulate in `state`,
  /// kReduce sums them, kStep calls `on_step` between reduce and gather.
  /// @param balance  balance loss of MoE layers; may be null
  /// @throws Error  with slot, unit and samples in its text; the communicator is aborted, `state`'s
  ///   gradients are undefined.
  StepOutcome run(const plan::StepPlan& plan, const plan::Program& program,
                  const SampleLoader& load, Zero1& state, model::RouterBalance* balance,
                  const std::function<void()>& on_step);

  /// Sum of token losses over `plan`, forward only, nothing updated. Collective.
  StepOutcome evaluate(const plan::StepPlan& plan, const plan::Program& program,
                       const SampleLoader& load, Zero1& state);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::parallel
