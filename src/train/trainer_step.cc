// One step of the trainer: order, execution, update, measurement.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/train/schedule.h"
#include "train/internal/trainer_impl.h"

namespace meshloom::train {

namespace {

constexpr const char* kStepWhere = "train.step";
constexpr double kNever = -std::numeric_limits<double>::infinity();
/// Added to the norm that clipping divides by, as torch's clip_grad_norm_ does.
constexpr double kClipEpsilon = 1e-6;

double seconds_between(std::chrono::steady_clock::time_point begin,
                       std::chrono::steady_clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

/// The instructions of one slot.
plan::Program only_slot(const plan::Program& program, int slot) {
  plan::Program result = program;
  std::erase_if(result.instructions,
                [&](const plan::Instruction& instruction) { return instruction.slot != slot; });
  return result;
}

/// Index of the first unit of each slot when a step's units are counted in order; the last entry is
/// their number.
std::vector<std::size_t> unit_offsets(const plan::StepPlan& plan) {
  std::vector<std::size_t> offsets{0};
  for (const plan::Slot& slot : plan.slots) offsets.push_back(offsets.back() + slot.units.size());
  return offsets;
}

/// Whether gradients are finite: of the units that this rank ran where `own`, else those that hold
/// other ranks' too, of experts and of parts that ZeRO sums as it goes.
bool finite_gradients(parallel::ModelState& state, bool own) {
  return std::all_of(state.parts().begin(), state.parts().end(), [&](auto& part) {
    const bool sums = part.space.zero() != parallel::Zero::kOptimizer;
    if (own == (sums || part.place.set == parallel::ReplicaSet::kExpert)) return true;
    const at::Tensor& gradient = sums ? part.space.shard_gradient() : part.space.gradients();
    return at::isfinite(gradient).all().template item<bool>();
  });
}

std::int64_t exchange_sent(const comm::Communicator& hdp) {
  const comm::Traffic traffic = hdp.traffic();
  const auto found = traffic.find("exchange");
  return found == traffic.end() ? 0 : found->second.sent_bytes;
}

}  // namespace

void Trainer::Impl::sum_over_ranks(at::Tensor& tensor) {
  world_.all_reduce_(tensor, comm::ReduceOp::kSum, {.timeout = std::nullopt, .purpose = "balance"})
      .wait();
}

detail::StepOrder Trainer::Impl::next_order(StepMetrics& metrics) {
  const auto limit =
      std::chrono::milliseconds(static_cast<std::int64_t>(config_.timeout_seconds * 1000.0));
  detail::StepPlanner::Result result;
  Failure failure;
  const Clock::time_point begin = Clock::now();
  if (planner_) {
    try {
      if (!planner_->started()) planner_->start(next_step_, cost_fit_.model(), memory_model());
      result = planner_->take(limit);
    } catch (const std::exception&) {
      failure = detail::current_failure();
    }
  }
  metrics.planning_seconds = seconds_between(begin, Clock::now());
  agree(kStepWhere, failure);
  const std::string bytes = detail::broadcast_text(world_, result.bytes, 0);
  if (planner_) {
    loader_state_ = result.loader_state;
    metrics.extra["plan_seconds"] = result.seconds;
    if (next_step_ + 1 < config_.steps) {
      planner_->start(next_step_ + 1, cost_fit_.model(), memory_model());
    }
  }
  detail::StepOrder order = detail::StepOrder::from_bytes(bytes);
  if (planner_ && !exchanges_told_) {
    std::string table = planner_->exchange_table(order.plan);
    exchanges_told_ = !table.empty();
    if (exchanges_told_) notices_.push_back(std::move(table));
  }
  return order;
}

parallel::SampleLoader Trainer::Impl::sample_loader(const data::StepMembership& members) const {
  auto refs = std::make_shared<std::map<std::int64_t, data::DocumentRef>>();
  for (std::size_t i = 0; i < members.samples.size(); ++i) {
    refs->emplace(members.samples[i].id, members.refs.at(i));
  }
  return [loader = loader_, refs](std::int64_t sample) {
    data::Document document = loader->load(refs->at(sample));
    return parallel::SampleTokens{std::move(document.tokens), std::move(document.loss_mask)};
  };
}

void Trainer::Impl::count_routing(const plan::Program& program,
                                  const parallel::SampleLoader& load) {
  balance_->begin_step(last_plan_.total_tokens());
  if (!balance_->needs_counting()) return;
  static_cast<void>(executor_->evaluate(last_plan_, program, load, *state_, balance_.get()));
  balance_->finish_counting([this](at::Tensor& counts) { sum_over_ranks(counts); });
}

void Trainer::Impl::update(Update& result) {
  double own = 0.0;
  for (std::size_t i = 0; i < optimizers_.size(); ++i) {
    own += optimizers_[i].squared_norm(state_->parts()[i].space.shard_gradient());
  }
  double squares = 0.0;
  // Shards cover every parameter once. Summed in rank order on every rank: the same norm
  // everywhere, whatever the backend.
  for (const std::vector<double>& rank : detail::gather_numbers(world_, {own})) {
    squares += rank[0];
  }
  result.norm = std::sqrt(squares);
  result.finite = std::isfinite(result.norm);
  const double factor = schedule_factor(config_.schedule, next_step_, config_.steps);
  result.lr = config_.optimizer.lr * factor;
  if (!result.finite) return;
  const double clip = config_.clip_norm;
  const bool clips = clip > 0.0 && result.norm + kClipEpsilon > clip;
  const double scale = clips ? clip / (result.norm + kClipEpsilon) : 1.0;
  const double choices = static_cast<double>(last_plan_.total_tokens()) *
                         static_cast<double>(model_.moe.experts_per_token);
  for (std::size_t i = 0; i < optimizers_.size(); ++i) {
    const parallel::ShardedSpace& space = state_->parts()[i].space;
    at::Tensor gradient = space.shard_gradient();
    if (bias_update_speed_ > 0.0) {
      at::Tensor master = space.master();
      move_correction_biases_(master, gradient, space.table(), space.own_range(), settings_,
                              choices / static_cast<double>(model_.moe.experts),
                              bias_update_speed_);
    }
    optimizers_[i].step(gradient, factor, scale);
  }
}

std::string Trainer::Impl::describe_unit(std::size_t index, const plan::Unit& unit,
                                         const data::StepMembership& membership) const {
  std::vector<std::string> samples;
  constexpr std::size_t kShown = 4;
  for (const std::int64_t id : unit.samples) {
    if (samples.size() == kShown) {
      samples.push_back(fmt::format("... {} in all", unit.samples.size()));
      break;
    }
    for (std::size_t i = 0; i < membership.samples.size(); ++i) {
      if (membership.samples[i].id != id) continue;
      samples.push_back(fmt::format("{} ({})", id, loader_->describe(membership.refs.at(i))));
    }
  }
  return fmt::format("unit {} (ranks {}), samples {}", index, fmt::join(unit.ranks, ","),
                     fmt::join(samples, ", "));
}

void Trainer::Impl::diagnose(const plan::Program& program, const detail::StepOrder& order,
                             const parallel::StepOutcome& outcome, StepMetrics& metrics) {
  // A loss that is not finite names its unit. Otherwise the slots run again one by one, and the
  // first that leaves such gradients on a rank is it.
  enum : int { kNone = -1 };
  double slot = kNone;
  double unit = kNone;
  double shared_slot = kNone;
  for (const parallel::UnitOutcome& entry : outcome.units) {
    if (std::isfinite(entry.loss_sum)) continue;
    slot = entry.slot;
    unit = entry.unit;
    break;
  }
  const char* what = "loss";
  bool of_group = false;
  std::vector<std::vector<double>> found = detail::gather_numbers(world_, {slot, unit});
  const auto none = [&] {
    return std::all_of(found.begin(), found.end(), [](const auto& rank) { return rank[0] < 0; });
  };
  if (none()) {
    what = "gradient";
    const parallel::SampleLoader load = sample_loader(order.membership);
    for (int s = 0; s < static_cast<int>(order.plan.slots.size()) && none(); ++s) {
      const plan::Program part = only_slot(program, s);
      if (!part.instructions.empty()) {
        static_cast<void>(executor_->run(order.plan, part, load, *state_, nullptr, [] {}));
        const bool idle = part.instructions.front().unit < 0;
        if (!idle && !finite_gradients(*state_, true)) {
          slot = s;
          unit = part.instructions.front().unit;
        } else if (!finite_gradients(*state_, false)) {
          shared_slot = s;  // tokens of any unit that its group met
        }
      }
      found = detail::gather_numbers(world_, {slot, unit});
      if (!none()) break;
      found = detail::gather_numbers(world_, {shared_slot, kNone});
      of_group = !none();
    }
  }
  std::size_t blamed = found.size();
  for (std::size_t r = 0; r < found.size(); ++r) {
    if (found[r][0] < 0) continue;
    if (blamed == found.size() || found[r][0] < found[blamed][0]) blamed = r;
  }
  std::string message;
  if (blamed == found.size()) {
    message = fmt::format(
        "step {}: the summed gradient has NaN or Inf, though no unit alone leaves any (overflow of "
        "the sum, or the balance loss)",
        next_step_);
  } else {
    const auto at_slot = static_cast<std::size_t>(found[blamed][0]);
    const std::vector<plan::Unit>& units = order.plan.slots.at(at_slot).units;
    std::vector<std::string> guilty;
    if (of_group) {
      const bool sharded = placement_.zero != parallel::Zero::kOptimizer;
      what = sharded ? "summed gradient" : "gradient of the experts";
      const int width = sharded ? config_.layout.hdp : config_.layout.ep;
      const int group = config_.layout.coordinates(static_cast<int>(blamed)).hdp / width;
      for (std::size_t u = 0; u < units.size(); ++u) {
        if (std::any_of(units[u].ranks.begin(), units[u].ranks.end(),
                        [&](int rank) { return rank / width == group; })) {
          guilty.push_back(describe_unit(u, units[u], order.membership));
        }
      }
    } else {
      const auto at_unit = static_cast<std::size_t>(found[blamed][1]);
      guilty.push_back(describe_unit(at_unit, units.at(at_unit), order.membership));
    }
    message = fmt::format("step {}: NaN or Inf in the {} on rank {}, slot {}, {}", next_step_, what,
                          blamed, at_slot, fmt::join(guilty, "; or "));
  }
  if (config_.nan_policy == "stop") {
    agreed_ = true;
    throw DataError(kStepWhere,
                    message + "; parameters are those before the step (nan_policy: stop)");
  }
  metrics.skipped = true;
  notices_.push_back(message + "; the step was skipped");
}

void Trainer::Impl::fit_cost(const std::vector<double>& busy, const std::vector<double>& wait) {
  std::map<std::int64_t, std::int64_t> tokens;
  for (const plan::SampleInfo& sample : last_plan_.samples) tokens[sample.id] = sample.tokens;
  std::size_t index = 0;
  for (const plan::Slot& slot : last_plan_.slots) {
    for (const plan::Unit& unit : slot.units) {
      UnitTiming seen;
      seen.degree = static_cast<int>(unit.ranks.size());
      for (const std::int64_t id : unit.samples) {
        const auto length = static_cast<double>(tokens.at(id));
        seen.square_sum += length * length;
        seen.token_sum += length;
      }
      // The model's costs are those of one stage of one tensor-parallel rank. What the member that
      // waited least waited for is transfer that nothing hid.
      const int ranks = seen.degree * config_.layout.tp * config_.layout.pp;
      seen.seconds = busy[index] / ranks + std::max(0.0, wait[index]);
      if (busy[index] > 0.0 && seen.token_sum > 0.0) cost_fit_.add(seen);
      ++index;
    }
  }
}

void Trainer::Impl::reduce_metrics(const parallel::StepOutcome& outcome, Clock::time_point begin,
                                   StepMetrics& metrics) {
  using Kind = parallel::Span::Kind;
  const std::vector<std::size_t> offsets = unit_offsets(last_plan_);
  const std::size_t units = offsets.back();
  std::vector<double> busy(units, 0.0);
  std::vector<double> wait(units, 0.0);
  std::vector<bool> mine(units, false);
  double busy_all = 0.0;
  double elapsed = 0.0;
  for (const parallel::Span& span : outcome.spans) {
    if (span.slot < 0 || span.unit < 0) continue;
    const std::size_t index =
        offsets[static_cast<std::size_t>(span.slot)] + static_cast<std::size_t>(span.unit);
    const double length = seconds_between(span.begin, span.end);
    elapsed = std::max(elapsed, seconds_between(begin, span.end));
    if (span.kind == Kind::kForward || span.kind == Kind::kBackward) {
      mine[index] = true;
      busy[index] += length;
      busy_all += length;
    } else if (span.kind == Kind::kWait) {
      wait[index] += length;
      busy[index] -= length;
      busy_all -= length;
    } else if (span.kind == Kind::kDispatch || span.kind == Kind::kTensor ||
               span.kind == Kind::kPipeline || span.kind == Kind::kOffload) {
      busy[index] -= length;
      busy_all -= length;
    }
  }

  constexpr std::size_t kSums = 5;
  const bool routes = outcome.expert_counts.defined();
  const auto counted = static_cast<std::int64_t>(kSums + units);
  const std::int64_t routed =
      model_.moe.experts > 0 ? model_.layers * model_.moe.experts : std::int64_t{0};
  at::Tensor sums = at::zeros({counted + routed}, at::kDouble);
  if (routes) sums.narrow(0, counted, routed).copy_(outcome.expert_counts.reshape({-1}));
  double* sum = sums.mutable_data_ptr<double>();
  sum[0] = outcome.loss_sum;
  sum[1] = outcome.z_loss_sum;
  sum[2] = balance_ ? balance_->loss() : 0.0;
  sum[3] = busy_all;
  sum[4] = static_cast<double>(metrics.exchange_bytes);
  std::copy(busy.begin(), busy.end(), sum + kSums);

  constexpr std::size_t kPeaks = 5;
  at::Tensor peaks = at::empty({static_cast<std::int64_t>(kPeaks + units)}, at::kDouble);
  double* peak = peaks.mutable_data_ptr<double>();
  const double minutes = seconds_between(saved_at_, Clock::now()) / 60.0;
  const bool due = world_.rank() == 0 && config_.checkpoint.every_minutes > 0.0 &&
                   minutes >= config_.checkpoint.every_minutes;
  peak[0] = elapsed;
  peak[1] = detail::stop_request_count() != stop_generation_ ? 1.0 : 0.0;
  peak[2] = due ? 1.0 : 0.0;
  peak[3] = seconds_between(begin, Clock::now());
  peak[4] = static_cast<double>(detail::measured_peak(device_, own_memory_));
  for (std::size_t i = 0; i < units; ++i) peak[kPeaks + i] = mine[i] ? -wait[i] : kNever;

  const at::Device control(world_.backend() == "nccl" ? device_ : at::Device(at::kCPU));
  const comm::CallOptions call{.timeout = std::nullopt, .purpose = "control"};
  sums = sums.to(control);
  peaks = peaks.to(control);
  world_.all_reduce_(sums, comm::ReduceOp::kSum, call).wait();
  world_.all_reduce_(peaks, comm::ReduceOp::kMax, call).wait();
  sums = sums.cpu();
  peaks = peaks.cpu();
  sum = sums.mutable_data_ptr<double>();
  peak = peaks.mutable_data_ptr<double>();

  metrics.loss = metrics.loss_tokens > 0 ? sum[0] / static_cast<double>(metrics.loss_tokens) : 0.0;
  metrics.z_loss = metrics.tokens > 0
                       ? config_.z_loss_coefficient * sum[1] / static_cast<double>(metrics.tokens)
                       : 0.0;
  metrics.aux_loss = sum[2];
  metrics.exchange_bytes = static_cast<std::int64_t>(sum[4]);
  if (routed > 0 && !metrics.skipped) {
    load_metrics({sum + counted, sum + counted + routed}, metrics);
  }
  metrics.measured_efficiency = peak[0] > 0.0 ? sum[3] / world_.size() / peak[0] : 0.0;
  metrics.seconds = peak[3];
  metrics.extra["peak_memory"] = peak[4];
  metrics.tokens_per_second =
      metrics.seconds > 0.0 ? static_cast<double>(metrics.tokens) / metrics.seconds : 0.0;
  stop_ = stop_ || peak[1] > 0.0;
  save_due_ = peak[2] > 0.0;
  if (fit_costs_ && !metrics.skipped) {
    std::vector<double> least(units);
    for (std::size_t i = 0; i < units; ++i) least[i] = -peak[kPeaks + i];
    fit_cost(std::vector<double>(sum + kSums, sum + kSums + units), least);
  }
}

StepMetrics Trainer::Impl::step() {
  const c10::DeviceGuard guard(device_);
  const Clock::time_point begin = Clock::now();
  StepMetrics metrics;
  metrics.step = next_step_;
  explainer_->begin();
  place("plan");
  const detail::StepOrder order = next_order(metrics);
  last_plan_ = order.plan;
  metrics.tokens = last_plan_.total_tokens();
  metrics.loss_tokens = last_plan_.total_loss_tokens();
  metrics.samples = static_cast<std::int64_t>(last_plan_.samples.size());
  metrics.balance_efficiency = last_plan_.predicted.efficiency;
  metrics.extra["epoch"] = static_cast<double>(order.membership.epoch);
  metrics.extra["split_documents"] = static_cast<double>(order.membership.split_documents);
  metrics.extra["skipped_documents"] = static_cast<double>(order.membership.skipped_documents);

  parallel::StepOutcome outcome;
  Update result;
  metrics.skipped = metrics.loss_tokens == 0;
  if (!metrics.skipped) {
    const parallel::SampleLoader load = sample_loader(order.membership);
    const plan::Program program = plan::compile_rank(last_plan_, compile_, world_.rank());
    const std::int64_t sent = exchange_sent(groups_->hdp());
    if (balance_) count_routing(program, load);
    outcome =
        executor_->run(last_plan_, program, load, *state_, balance_.get(), [&] { update(result); });
    metrics.exchange_bytes = exchange_sent(groups_->hdp()) - sent;
    metrics.gradient_norm = result.norm;
    metrics.lr = result.lr;
    if (!result.finite) diagnose(program, order, outcome, metrics);
    if (balance_) {
      balance_->end_step([this](at::Tensor& counts) { sum_over_ranks(counts); });
    }
  } else {
    notices_.push_back(fmt::format("step {} has no loss token and was skipped", next_step_));
  }
  place("metrics");
  reduce_metrics(outcome, begin, metrics);
  replan_experts(metrics);
  reduce_offload(outcome.offload, metrics);
  for (std::string& notice : explainer_->explain(last_plan_, outcome.spans, metrics)) {
    notices_.push_back(std::move(notice));
  }
  if (metrics.skipped) ++skipped_steps_;
  tokens_seen_ += static_cast<double>(metrics.tokens);
  metrics.extra["skipped_steps"] = static_cast<double>(skipped_steps_);
  metrics.extra["tokens_seen"] = tokens_seen_;
  if (config_.timeline_steps > 0) {
    traces_.push_back({.step = next_step_, .spans = std::move(outcome.spans)});
    while (static_cast<std::int64_t>(traces_.size()) > config_.timeline_steps) traces_.pop_front();
  }
  ++next_step_;
  return metrics;
}

}  // namespace meshloom::train
