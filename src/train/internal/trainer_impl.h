#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/cost/fit.h"
#include "meshloom/cost/memory_model.h"
#include "meshloom/cost/transfer_refiner.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/stage.h"
#include "meshloom/parallel/executor.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/model_state.h"
#include "meshloom/train/adamw.h"
#include "meshloom/train/checkpoint.h"
#include "meshloom/train/trainer.h"
#include "train/internal/collective.h"
#include "train/internal/expert_loads.h"
#include "train/internal/memory_check.h"
#include "train/internal/requests.h"
#include "train/internal/run_lock.h"
#include "train/internal/run_records.h"
#include "train/internal/run_watch.h"
#include "train/internal/setup.h"
#include "train/internal/step_explainer.h"
#include "train/internal/step_planner.h"

namespace meshloom::train {

class Trainer::Impl {
 public:
  Impl(const TrainConfig& config, const model::ModelConfig& model,
       std::shared_ptr<data::Loader> loader, comm::Communicator world,
       std::shared_ptr<plan::BalanceStrategy> strategy, TrainerHooks hooks);

  StepMetrics step();
  double evaluate();
  void save_checkpoint();
  void save_pretrained(const std::string& folder);
  std::optional<StepMetrics> advance();

  /// Runs `body`; a failure that the ranks did not agree on aborts the world with its reason.
  template <class Body>
  auto guarded(const Body& body) {
    agreed_ = false;
    const LabelEnd label{world_};
    try {
      return body();
    } catch (const std::exception& error) {
      if (!agreed_) world_.abort(error.what());
      if (watch_) watch_->write(error.what());
      throw;
    }
  }

  TrainConfig config_;
  model::ModelConfig model_;
  std::int64_t next_step_ = 0;
  std::string resumed_from_;
  std::vector<std::string> notices_;
  plan::StepPlan last_plan_;
  MemoryReport memory_;

 private:
  using Clock = std::chrono::steady_clock;
  using Failure = std::optional<detail::LocalFailure>;

  /// Nothing that a call said of its place outlives it.
  struct LabelEnd {
    const comm::Communicator& world;
    ~LabelEnd() { world.recorder().set_label({}); }
  };

  /// What the reduce of a step's gradients showed.
  struct Update {
    double norm = 0.0;
    double lr = 0.0;
    bool finite = true;
  };

  // Construction and state.
  void resolve();
  void forecast_memory();
  void build(std::shared_ptr<plan::BalanceStrategy> strategy);
  void choose_exchanges();
  void resume();
  bool try_resume(const std::string& folder, Failure& failure);
  void restore(const CheckpointInfo& info);
  [[nodiscard]] CheckpointInfo checkpoint_info() const;
  [[nodiscard]] std::string experts_text() const;
  [[nodiscard]] std::vector<CheckpointPart> shard_states() const;
  [[nodiscard]] std::string checkpoints() const { return config_.run + "/checkpoints"; }
  void prepare_folder();
  void lock_folder();

  // A step.
  [[nodiscard]] detail::StepOrder next_order(StepMetrics& metrics);
  [[nodiscard]] parallel::SampleLoader sample_loader(const data::StepMembership& members) const;
  void count_routing(const plan::Program& program, const parallel::SampleLoader& load);
  void update(Update& result);
  [[nodiscard]] std::string describe_unit(std::size_t index, const plan::Unit& unit,
                                          const data::StepMembership& membership) const;
  void diagnose(const plan::Program& program, const detail::StepOrder& order,
                const parallel::StepOutcome& outcome, StepMetrics& metrics);
  void reduce_metrics(const parallel::StepOutcome& outcome, Clock::time_point begin,
                      StepMetrics& metrics);
  void reduce_offload(const parallel::OffloadOutcome& own, StepMetrics& metrics);
  /// For the next plan.
  [[nodiscard]] MemoryModel memory_model() const;
  void fit_cost(const std::vector<double>& busy, const std::vector<double>& wait);
  void sum_over_ranks(at::Tensor& tensor);

  // Experts.
  void watch_experts();
  void load_metrics(const detail::ExpertCounts& counts, StepMetrics& metrics);
  void replan_experts(StepMetrics& metrics);
  /// Optimizers follow the state's parameters to their places.
  void settle_optimizers();

  /// Writes a model folder beside `folder` and puts it in its place. @param write  fills it, on
  /// rank 0
  void write_model(const std::string& folder,
                   const std::function<void(const std::string& target)>& write);
  void save_final_model();

  // A run.
  void begin_run();
  void end_run();
  void write_records(const StepMetrics& metrics);
  void write_timeline();
  void write_traffic();
  void write_memory();
  /// Says in the flight recorder what the rank does outside of its program.
  void place(const char* what) {
    comm::Label label;
    label.step = next_step_;
    label.instruction = what;
    world_.recorder().set_label(std::move(label));
  }
  /// The body on rank 0; its failure is everybody's.
  void on_rank_0(const char* where, const std::function<void()>& body);
  void agree(const char* where, const Failure& failure);
  [[nodiscard]] bool checkpoint_due() const;

  std::shared_ptr<data::Loader> loader_;
  comm::Communicator world_;
  TrainerHooks hooks_;
  detail::Hosts hosts_;
  at::Device device_{at::kCPU};
  parallel::ModelPlacement placement_;  ///< the layout's; the state's experts may have moved
  plan::CompileOptions compile_;        ///< how plans become programs
  detail::OwnMemory own_memory_;
  std::optional<parallel::Groups> groups_;
  std::vector<std::shared_ptr<model::Stage>> stages_;  ///< [chunk]
  std::unique_ptr<parallel::ModelState> state_;
  std::vector<ParameterSetting> settings_;
  std::vector<AdamW> optimizers_;  ///< one for each of the state's parts
  double bias_update_speed_ = 0.0;
  std::unique_ptr<model::BalanceLoss> balance_;
  std::optional<detail::ExpertLoads> expert_loads_;  ///< where experts may move
  parallel::ExchangeOptions exchange_options_;
  bool exchanges_told_ = false;  ///< why units use the exchanges they do
  std::unique_ptr<parallel::Executor> executor_;
  std::unique_ptr<detail::StepPlanner> planner_;  ///< rank 0
  std::unique_ptr<detail::RunLock> lock_;         ///< rank 0, once the run folder is in use
  std::unique_ptr<detail::RunRecords> records_;   ///< rank 0, while `run` runs
  std::unique_ptr<detail::StepExplainer> explainer_;
  std::unique_ptr<detail::RunWatch> watch_;  ///< once the run folder is there
  CostRefiner cost_fit_;
  bool fit_costs_ = false;
  TransferRefiner transfer_fit_;
  std::string loader_state_;     ///< after the membership of the last step taken
  std::int64_t first_step_ = 0;  ///< the first one of this trainer
  double tokens_seen_ = 0.0;
  std::int64_t skipped_steps_ = 0;
  std::deque<detail::StepTrace> traces_;
  std::size_t noted_ = 0;  ///< notices in the records so far; rank 0
  bool agreed_ = false;
  bool folder_ready_ = false;
  bool running_ = false;  ///< between the first `advance` and the one that ended the run
  bool trained_ = false;  ///< some step since `begin_run`
  int stop_generation_ = 0;
  bool stop_ = false;      ///< agreed: some rank was asked to stop
  bool save_due_ = false;  ///< agreed: rank 0's clock says so
  std::int64_t saved_step_ = -1;
  std::string saved_in_;  ///< the checkpoint of that step
  Clock::time_point saved_at_ = Clock::now();
};

}  // namespace meshloom::train
