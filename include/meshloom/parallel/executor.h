#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/model/stage.h"
#include "meshloom/model/token_dispatcher.h"
#include "meshloom/parallel/parameter_state.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/parallel/span.h"
#include "meshloom/parallel/zero1.h"
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
  double loss_sum = 0.0;  ///< token losses of this rank's micro-batches, unweighted
  double z_loss_sum = 0.0;
  std::int64_t tokens = 0;  ///< processed by this rank
  std::vector<UnitOutcome> units;
  /// fp64 [layers, experts]: times that this rank's tokens chose each expert; undefined for dense
  /// models and in `evaluate`.
  at::Tensor expert_counts;
  std::vector<Span> spans;  ///< in order of their end
};

struct ExecutorOptions {
  double z_loss_coefficient = 0.0;
  bool record_spans = true;
  /// Called before each instruction, within its measured time, e.g. to inject delays and failures
  /// in tests; may throw.
  std::function<void(const plan::Instruction&)> before;
};

/// Makes the attention exchange of one micro-batch; the default is RingExchange for D > 1 and
/// LocalAttention for D = 1. `buffers` are the executor's, shared by all its micro-batches.
using ExchangeFactory = std::function<std::unique_ptr<model::AttentionExchange>(
    const comm::Communicator& hdp, const plan::Unit& unit, SpanSink spans,
    std::shared_ptr<ExchangeBuffers> buffers)>;

/// @throws NotSupported  the unit's exchange is not built; names it.
[[nodiscard]] MESHLOOM_API std::unique_ptr<model::AttentionExchange> make_exchange(
    const comm::Communicator& hdp, const plan::Unit& unit, SpanSink spans,
    std::shared_ptr<ExchangeBuffers> buffers = {});

/// Makes the token dispatcher of one micro-batch.
using DispatcherFactory = std::function<std::unique_ptr<model::TokenDispatcher>(SpanSink spans)>;

/// Interpreter of Programs on tensors, for one rank: a table from instruction to action, and the
/// micro-batches in flight. The optimizer update is the caller's (`on_step`). Every call that it
/// makes carries step, instruction, slot, unit and samples in the flight recorder. Not thread safe.
class MESHLOOM_API Executor {
 public:
  /// @param stage  the model chunk of this rank; the caller may share it with other executors
  /// @param hdp    communicator over the HDP axis
  /// @param dispatcher  none: every rank holds all experts; plans with ep > 1 are then refused
  Executor(std::shared_ptr<model::Stage> stage, comm::Communicator hdp,
           ExecutorOptions options = {}, ExchangeFactory exchange = make_exchange,
           DispatcherFactory dispatcher = {});
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  /// Runs `program` of `plan`. Collective over the HDP axis. Gradients accumulate in `state`, which
  /// is zeroed first; kReduce sums them, kStep calls `on_step`, then gathers parameters.
  /// @param balance  balance loss of MoE layers; may be null. The `sequence` form's counts are
  /// summed
  ///   over the unit here.
  /// @throws NotSupported     a layout with tp, pp, ep or chunks above 1, or offload: names it;
  ///   nothing has run.
  /// @throws InvalidArgument  plan, program and communicator do not belong together; nothing has
  /// run.
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
