#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/model/stage.h"
#include "meshloom/parallel/activation_offload.h"
#include "meshloom/parallel/exchange.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/parameter_state.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/parallel/span.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::parallel {

/// Loss of one unit's share on this rank.
struct UnitOutcome {
  int slot = 0;
  int unit = 0;
  std::int64_t tokens = 0;
  double loss_sum = 0.0;  ///< unweighted sum of token losses; NaN or Inf names the unit to blame
};

/// What one rank knows after running its program.
struct StepOutcome {
  /// Token losses of this rank's micro-batches, unweighted: of ranks with a head, and of those the
  /// first of each tensor-parallel group. Sums over all ranks are the step's.
  double loss_sum = 0.0;
  double z_loss_sum = 0.0;
  std::int64_t tokens = 0;  ///< whose losses are in loss_sum
  std::vector<UnitOutcome> units;
  /// fp64 [layers, experts]: times that this rank's tokens chose each expert; undefined for dense
  /// models and in `evaluate`.
  at::Tensor expert_counts;
  OffloadOutcome offload;
  std::vector<Span> spans;  ///< in order of their end
};

struct ExecutorOptions {
  double z_loss_coefficient = 0.0;
  bool record_spans = true;
  model::Recompute recompute = model::Recompute::kNone;  ///< the same on all ranks
  std::string spill_folder;  ///< of offloaded activations, see ActivationOffload
  /// Called before each instruction, within its measured time, e.g. to inject delays and failures
  /// in tests; may throw.
  std::function<void(const plan::Instruction&)> before;
};

/// Interpreter of Programs on tensors, for one rank of any layout: a table from instruction to
/// action, and the micro-batches in flight. The optimizer update is the caller's (`on_step`). Every
/// call that it makes carries step, instruction, slot, unit and samples in the flight recorder. Not
/// thread safe.
class MESHLOOM_API Executor {
 public:
  /// @param stages     from `build_stages`; the caller may share them with other executors
  /// @param placement  what the stages, the groups and the state were made from
  /// @param exchange   makes the attention exchange of each unit
  Executor(std::vector<std::shared_ptr<model::Stage>> stages, const ModelPlacement& placement,
           Groups groups, ExecutorOptions options = {}, ExchangeFactory exchange = make_exchange);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  /// Runs `program` of `plan`. Collective over the world. Gradients accumulate in `state`, which
  /// is zeroed first; kReduce sums them, kStep calls `on_step`, then gathers parameters.
  /// @param balance  balance loss of MoE layers; may be null. The `sequence` form's counts are
  ///   summed over the unit here.
  /// @throws PlanError        a unit offloads by a memory model of other layers; names slot and
  /// unit;
  ///   nothing has run.
  /// @throws InvalidArgument  plan, program and groups do not belong together, or ZeRO 2 or 3
  ///   under a plan that is not in lockstep; nothing has run.
  /// @throws Error  with step, slot, unit and samples added to its text; the communicator is
  ///   aborted with that text, gradients are undefined, parameters are those before the step unless
  ///   kStep had begun.
  StepOutcome run(const plan::StepPlan& plan, const plan::Program& program,
                  const SampleLoader& load, ParameterState& state, model::RouterBalance* balance,
                  const std::function<void()>& on_step);

  /// Forward passes of `program` alone: nothing is saved, summed or updated. Collective.
  /// @param balance  observes routing, e.g. for a counting pass; may be null
  StepOutcome evaluate(const plan::StepPlan& plan, const plan::Program& program,
                       const SampleLoader& load, ParameterState& state,
                       model::RouterBalance* balance = nullptr);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::parallel
