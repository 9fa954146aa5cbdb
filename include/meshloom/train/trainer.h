#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/data/loader.h"
#include "meshloom/model/config.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/config.h"

namespace meshloom::train {

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
};

/// Trains one model on one communicator: plans, executes, records. Every rank constructs it with
/// the same arguments and makes the same calls (collective). Not thread safe.
class MESHLOOM_API Trainer {
 public:
  /// @param loader    documents; on every rank the same sources
  /// @param strategy  null: the built-in named by config.strategy
  Trainer(const TrainConfig& config, const model::ModelConfig& model,
          std::shared_ptr<data::Loader> loader, comm::Communicator world,
          std::shared_ptr<plan::BalanceStrategy> strategy = nullptr);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  [[nodiscard]] std::int64_t next_step() const;
  [[nodiscard]] bool finished() const;

  /// One optimizer step. Planning and verification of the next one run meanwhile.
  StepMetrics step();

  /// Mean token loss over held-out documents.
  double evaluate();

  /// Writes <run>/checkpoints/step-N atomically; the previous ones stay until it is complete.
  void save_checkpoint();
  /// A folder that Hugging Face transformers opens. Collective; rank 0 writes.
  void save_pretrained(const std::string& folder);

  /// Steps until `finished`, with evaluation, checkpoints and run-folder records as configured;
  /// `on_step` (may be empty) is called after each step on every rank. Ends early, with a
  /// checkpoint, after `request_stop`.
  void run(const std::function<void(const StepMetrics&)>& on_step = {});

  /// Async-signal-safe: finish the current step, save, return from `run`.
  static void request_stop() noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::train
