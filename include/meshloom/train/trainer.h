#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/data/loader.h"
#include "meshloom/model/config.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/config.h"
#include "meshloom/train/memory_report.h"

namespace meshloom::train {

/// Communication of one kind (comm::CallOptions::purpose) in one step, summed over ranks.
struct KindTraffic {
  std::int64_t inside_bytes = 0;   ///< sent to ranks of the same host
  std::int64_t between_bytes = 0;  ///< sent to ranks of other hosts
  double seconds = 0.0;            ///< calls were under way, late peers included
  double exposed_seconds = 0.0;    ///< ranks were blocked for them
};

/// One rank's time in one step, in seconds.
struct RankTimes {
  double planned = 0.0;  ///< for its units, by costs fitted to this run and the middle rank's pace
  double busy = 0.0;     ///< forward and backward, waiting excluded
  double load = 0.0;
  double exposed = 0.0;  ///< blocked in communication
};

/// One step as everybody sees it: equal on all ranks.
struct StepMetrics {
  std::int64_t step = 0;
  double loss = 0.0;  ///< mean token cross-entropy over the step
  double aux_loss = 0.0;
  double z_loss = 0.0;
  double gradient_norm = 0.0;  ///< before clipping
  double lr = 0.0;
  std::int64_t tokens = 0;
  std::int64_t loss_tokens = 0;
  std::int64_t samples = 0;
  double seconds = 0.0;
  double tokens_per_second = 0.0;
  double balance_efficiency = 0.0;   ///< the plan's prediction
  double measured_efficiency = 0.0;  ///< mean over ranks of busy time / slowest rank's step time
  double planning_seconds = 0.0;     ///< that the step had to wait for
  std::int64_t exchange_bytes = 0;   ///< keys, values and their gradients sent, all ranks
  bool skipped = false;              ///< no loss tokens, or NaN under the skip policy
  std::map<std::string, double> extra;
  std::map<std::string, KindTraffic> traffic;       ///< by kind
  std::map<std::string, std::int64_t> group_bytes;  ///< sent, by group; without its number
  std::vector<RankTimes> ranks;                     ///< by rank
};

/// What a program hooks into a Trainer; every field may be empty.
struct TrainerHooks {
  /// Before each instruction of this rank's programs, within its measured time, e.g. to inject
  /// delays and failures in tests; may throw.
  std::function<void(const plan::Instruction&)> before;
  /// The report (comm::Communicator::report) of a call that hangs, and of Trainer::request_report;
  /// on a thread of the trainer's.
  std::function<void(const std::string& report)> on_hang;
};

/// Trains one model on one communicator: plans, executes, records. Every rank constructs it with
/// the same arguments and makes the same calls (collective). Rank 0 plans: a background thread of
/// its decides the next step's membership, plans and verifies it while the current step computes.
/// Not thread safe.
///
/// Errors. What can fail on one rank alone between collectives (checkpoints, records, planning) is
/// agreed upon: all ranks throw the same error, which names the rank, and the communicator stays
/// usable. A failure inside a step aborts the communicator with its reason, so that every rank ends
/// with an error that names the origin.
class MESHLOOM_API Trainer {
 public:
  /// Builds the model, fills it (config.model.path, else by seed), and continues from the run
  /// folder's newest checkpoint as config.checkpoint.resume says. Writes nothing yet.
  /// @param loader    documents; on every rank the same sources. Ranks may share one.
  /// @param world     deterministic() where config.deterministic
  /// @param strategy  null: the built-in named by config.strategy
  /// @throws Error  on all ranks alike
  Trainer(const TrainConfig& config, const model::ModelConfig& model,
          std::shared_ptr<data::Loader> loader, comm::Communicator world,
          std::shared_ptr<plan::BalanceStrategy> strategy = nullptr, TrainerHooks hooks = {});
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// As resolved: layout, capacity, threads.
  [[nodiscard]] const TrainConfig& config() const;
  [[nodiscard]] const model::ModelConfig& model_config() const;
  /// The step that `step` runs next; also the number of steps done, skipped ones included.
  [[nodiscard]] std::int64_t next_step() const;
  [[nodiscard]] bool finished() const;
  /// The checkpoint folder that training continued from; empty for a fresh start.
  [[nodiscard]] const std::string& resumed_from() const;
  /// What a user should know and no error says: damaged checkpoints that were passed over, records
  /// moved aside, skipped steps. In order of time; equal on all ranks.
  [[nodiscard]] const std::vector<std::string>& notices() const;
  /// What the run was expected to take of its machines before anything was built.
  [[nodiscard]] const MemoryReport& memory() const;
  /// The plan of the last `step`.
  [[nodiscard]] const plan::StepPlan& last_plan() const;

  /// One optimizer step.
  /// @throws DataError  NaN or Inf under nan_policy stop; names rank, unit and samples. Parameters
  ///   are those before the step.
  StepMetrics step();

  /// Mean token loss over held-out documents. @throws DataError  none are held out.
  double evaluate();

  /// Writes <run>/checkpoints/step-N atomically; the previous ones stay until it is complete.
  void save_checkpoint();
  /// A folder that Hugging Face transformers opens, in compute dtype. Collective; rank 0 writes.
  void save_pretrained(const std::string& folder);

  /// One step with the run folder's records, and evaluation and checkpoints where they are due.
  /// nullopt once the run has ended: finished, or asked to stop. Then the last state is in a
  /// checkpoint, and of a finished run <run>/checkpoint is the model as `save_pretrained` writes
  /// it.
  std::optional<StepMetrics> advance();

  /// `advance` until the run has ended; `on_step` (may be empty) is called after each step on every
  /// rank.
  void run(const std::function<void(const StepMetrics&)>& on_step = {});

  /// Async-signal-safe: every `run` of this process, on all ranks of its world, finishes the step
  /// it is in, saves, and returns. One rank's call is enough.
  static void request_stop() noexcept;

  /// Async-signal-safe: every Trainer of this process with a run folder soon adds what its rank
  /// waits for and did before to `<run>/flight/rank-R.txt`, whatever it is doing.
  static void request_report() noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::train
