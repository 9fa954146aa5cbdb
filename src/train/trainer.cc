#include "meshloom/train/trainer.h"

#include <fmt/format.h>

#include <atomic>
#include <filesystem>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/train/checkpoint.h"
#include "train/internal/checkpoint_file.h"
#include "train/internal/trainer_impl.h"

namespace meshloom::train {

namespace {

constexpr const char* kTrainerWhere = "train.trainer";

/// Times that a stop, or a report, was asked for in this process: a signal handler has nothing but
/// a global.
std::atomic<int> stop_requests{0};
std::atomic<int> report_requests{0};
static_assert(std::atomic<int>::is_always_lock_free);

}  // namespace

void Trainer::request_stop() noexcept { stop_requests.fetch_add(1, std::memory_order_relaxed); }

void Trainer::request_report() noexcept { report_requests.fetch_add(1, std::memory_order_relaxed); }

int detail::stop_request_count() noexcept { return stop_requests.load(std::memory_order_relaxed); }

int detail::report_request_count() noexcept {
  return report_requests.load(std::memory_order_relaxed);
}

Trainer::Trainer(const TrainConfig& config, const model::ModelConfig& model,
                 std::shared_ptr<data::Loader> loader, comm::Communicator world,
                 std::shared_ptr<plan::BalanceStrategy> strategy, TrainerHooks hooks)
    : impl_(std::make_unique<Impl>(config, model, std::move(loader), std::move(world),
                                   std::move(strategy), std::move(hooks))) {}

Trainer::~Trainer() = default;

const TrainConfig& Trainer::config() const { return impl_->config_; }
const model::ModelConfig& Trainer::model_config() const { return impl_->model_; }
std::int64_t Trainer::next_step() const { return impl_->next_step_; }
bool Trainer::finished() const { return impl_->next_step_ >= impl_->config_.steps; }
const std::string& Trainer::resumed_from() const { return impl_->resumed_from_; }
const std::vector<std::string>& Trainer::notices() const { return impl_->notices_; }
const MemoryReport& Trainer::memory() const { return impl_->memory_; }
const plan::StepPlan& Trainer::last_plan() const { return impl_->last_plan_; }

StepMetrics Trainer::step() {
  return impl_->guarded([&] { return impl_->step(); });
}

double Trainer::evaluate() {
  return impl_->guarded([&] { return impl_->evaluate(); });
}

void Trainer::save_checkpoint() {
  impl_->guarded([&] { impl_->save_checkpoint(); });
}

void Trainer::save_pretrained(const std::string& folder) {
  impl_->guarded([&] { impl_->save_pretrained(folder); });
}

std::optional<StepMetrics> Trainer::advance() {
  return impl_->guarded([&] { return impl_->advance(); });
}

void Trainer::run(const std::function<void(const StepMetrics&)>& on_step) {
  while (const std::optional<StepMetrics> metrics = advance()) {
    if (on_step) impl_->guarded([&] { on_step(*metrics); });
  }
}

void Trainer::Impl::agree(const char* where, const Failure& failure) {
  if (const auto first = detail::first_failure(world_, failure)) {
    agreed_ = true;
    throw_error(first->code, where, first->message);
  }
}

void Trainer::Impl::on_rank_0(const char* where, const std::function<void()>& body) {
  Failure failure;
  if (world_.rank() == 0) {
    try {
      body();
    } catch (const std::exception&) {
      failure = detail::current_failure();
    }
  }
  agree(where, failure);
}

void Trainer::Impl::save_pretrained(const std::string& folder) {
  const at::Tensor values = state_->whole_values();
  write_model(folder, [&](const std::string& target) {
    model::save_pretrained(target, model_,
                           model::parameter_table(model_, {0, model_.layers}, true, true), values,
                           {.dtype = state_->compute()});
  });
}

void Trainer::Impl::write_model(const std::string& folder,
                                const std::function<void(const std::string& target)>& write) {
  on_rank_0("train.save_pretrained", [&] {
    const std::filesystem::path target = std::filesystem::path(folder).lexically_normal();
    const std::filesystem::path base = target.has_filename() ? target : target.parent_path();
    const std::filesystem::path temporary =
        base.parent_path() / fmt::format(".{}.writing", base.filename().string());
    const std::filesystem::path old =
        base.parent_path() / fmt::format(".{}.replaced", base.filename().string());
    try {
      std::filesystem::remove_all(temporary);
      std::filesystem::remove_all(old);
      std::filesystem::create_directories(temporary);
      write(temporary.string());
      if (std::filesystem::exists(base)) std::filesystem::rename(base, old);
      std::filesystem::rename(temporary, base);
      std::filesystem::remove_all(old);
    } catch (const std::filesystem::filesystem_error& error) {
      throw IoError(kTrainerWhere, error.what());
    } catch (const Error&) {
      std::error_code ignored;
      std::filesystem::remove_all(temporary, ignored);
      throw;
    }
  });
}

void Trainer::Impl::prepare_folder() {
  std::string moved;
  on_rank_0(kTrainerWhere, [&] {
    std::error_code error;
    std::filesystem::create_directories(config_.run, error);
    if (error) {
      throw IoError(kTrainerWhere,
                    fmt::format("cannot create {}: {}", config_.run, error.message()));
    }
    lock_folder();
    if (!folder_ready_ && resumed_from_.empty()) moved = detail::set_aside(config_.run);
  });
  if (folder_ready_) return;
  moved = detail::broadcast_text(world_, moved, 0);
  if (!moved.empty()) {
    notices_.push_back(fmt::format("an earlier run's records were moved to {}", moved));
  }
  watch_ = std::make_unique<detail::RunWatch>(world_, config_.run, config_.watchdog_seconds,
                                              hooks_.on_hang);
  folder_ready_ = true;
}

void Trainer::Impl::lock_folder() {
  if (lock_) return;
  lock_ = std::make_unique<detail::RunLock>(config_.run);
  if (lock_->unsupported().empty()) return;
  notices_.push_back(
      fmt::format("the file system of the run folder {} locks no files ({}): nothing "
                  "keeps a second run out",
                  config_.run, lock_->unsupported()));
}

void Trainer::Impl::write_records(const StepMetrics& metrics) {
  on_rank_0("train.records", [&] {
    records_->step(metrics);
    for (; noted_ < notices_.size(); ++noted_) records_->notice(metrics.step, notices_[noted_]);
    if (config_.save_plans) records_->plan(last_plan_);
  });
}

void Trainer::Impl::write_traffic() {
  const std::string text = explainer_->traffic_json(first_step_, next_step_);
  on_rank_0("train.records", [&] { records_->traffic(text); });
}

void Trainer::Impl::write_memory() {
  std::vector<double> peaks;
  const auto own = static_cast<double>(detail::measured_peak(device_, own_memory_));
  for (const std::vector<double>& rank : detail::gather_numbers(world_, {own})) {
    peaks.push_back(rank[0]);
  }
  on_rank_0("train.records",
            [&] { records_->memory(detail::memory_json(memory_, config_.layout, peaks)); });
}

void Trainer::Impl::write_timeline() {
  if (config_.timeline_steps == 0) return;
  const std::vector<std::string> tracks =
      detail::gather_text(world_, detail::trace_events(world_.rank(), traces_));
  on_rank_0("train.records", [&] {
    std::string text = "[\n";
    for (std::size_t r = 0; r < tracks.size(); ++r) text += (r > 0 ? ",\n" : "") + tracks[r];
    const std::string path = config_.run + "/timeline.json";
    detail::write_durably(path + ".writing", text + "\n]\n");
    std::error_code error;
    std::filesystem::rename(path + ".writing", path, error);
    if (error)
      throw IoError(kTrainerWhere, fmt::format("cannot write {}: {}", path, error.message()));
  });
}

bool Trainer::Impl::checkpoint_due() const {
  const std::int64_t every = config_.checkpoint.every_steps;
  return save_due_ || (every > 0 && next_step_ % every == 0);
}

void Trainer::Impl::begin_run() {
  prepare_folder();
  on_rank_0("train.evaluate", [&] {
    if (config_.evaluate_every > 0 && loader_->held_out(config_.evaluate_tokens).samples.empty()) {
      throw InvalidArgument("train.evaluate",
                            fmt::format("evaluate_every is {}, but no documents are "
                                        "held out; set data.held_out_fraction",
                                        config_.evaluate_every));
    }
  });
  on_rank_0("train.records", [&] {
    records_ = std::make_unique<detail::RunRecords>(config_.run, next_step_);
    records_->config(config_.to_yaml());
  });
  saved_at_ = Clock::now();
  trained_ = false;
  running_ = true;
}

void Trainer::Impl::end_run() {
  place("records");
  if (trained_ && saved_step_ != next_step_) save_checkpoint();
  write_memory();
  place("records");
  write_traffic();
  write_timeline();
  place("save_pretrained");
  if (!stop_) save_final_model();
  records_.reset();
  lock_.reset();
  running_ = false;
  stop_ = false;
  stop_generation_ = detail::stop_request_count();
}

/// From the last checkpoint where that is of this step, so that no rank holds the whole model.
void Trainer::Impl::save_final_model() {
  const std::string folder = config_.run + "/checkpoint";
  if (saved_step_ != next_step_) return save_pretrained(folder);
  write_model(folder, [&](const std::string& target) {
    export_checkpoint(saved_in_, target, config_.dtype);
  });
}

std::optional<StepMetrics> Trainer::Impl::advance() {
  if (!running_) begin_run();
  if (next_step_ >= config_.steps || stop_) {
    end_run();
    return std::nullopt;
  }
  StepMetrics metrics = step();
  trained_ = true;
  place("records");
  write_records(metrics);
  if (config_.evaluate_every > 0 && next_step_ % config_.evaluate_every == 0) {
    place("evaluate");
    const double loss = evaluate();
    metrics.extra["evaluation_loss"] = loss;
    on_rank_0("train.records", [&] { records_->evaluation(metrics.step, loss); });
  }
  if (checkpoint_due()) {
    save_checkpoint();
    place("records");
    write_traffic();
    write_memory();
    write_timeline();
  }
  return metrics;
}

}  // namespace meshloom::train
