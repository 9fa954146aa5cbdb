// Construction, checkpoints and resumption of the trainer.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/parallel/exchange_figures.h"
#include "meshloom/plan/exchange_choice.h"
#include "train/internal/trainer_impl.h"

namespace meshloom::train {

namespace {

constexpr const char* kStateWhere = "train.trainer";

/// Work of the model itself, in units of its attention: per layer a causal token pair costs
/// heads * (head_dim + value_dim) operations, a token 2 per parameter that it meets.
CostModel model_cost(const model::ModelConfig& model) {
  const auto inactive = [&] {
    std::int64_t result = 0;
    for (const bool moe : model.moe_layers) {
      if (!moe) continue;
      result += (model.moe.experts - model.moe.experts_per_token) * 3 * model.hidden_size *
                model.moe.intermediate_size;
    }
    return result;
  }();
  const std::int64_t lookup = model.tie_word_embeddings ? 0 : model.vocab_size * model.hidden_size;
  const std::int64_t active = model.parameter_count() - inactive - lookup;
  const std::int64_t pairs = model.layers * model.heads * (model.head_dim + model.value_dim()) / 2;
  return {
      .quadratic = 1.0,
      .linear = static_cast<double>(active) / static_cast<double>(std::max<std::int64_t>(1, pairs)),
      .fixed = 0.0,
      .exchange = 0.0};
}

std::string tensor_text(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  const at::Tensor flat = tensor.to(at::kCPU, at::kDouble).contiguous();
  const double* data = flat.const_data_ptr<double>();
  nlohmann::json values = std::vector<double>(data, data + flat.numel());
  return nlohmann::json{{"shape", tensor.sizes().vec()}, {"values", std::move(values)}}.dump();
}

at::Tensor parse_tensor(const std::string& text, at::Device device) {
  const auto entry = nlohmann::json::parse(text);
  const auto values = entry.at("values").get<std::vector<double>>();
  at::Tensor result = at::empty(entry.at("shape").get<std::vector<std::int64_t>>(), at::kDouble);
  if (result.numel() != static_cast<std::int64_t>(values.size())) {
    throw DataError(kStateWhere, "the checkpoint's balance state has another size than its shape");
  }
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return result.to(device);
}

std::string info_text(const CheckpointInfo& info, const char* name) {
  const auto found = info.texts.find(name);
  return found == info.texts.end() ? std::string() : found->second;
}

/// @throws InvalidArgument  names the first key in which the checkpoint's model is another.
void check_same_model(const std::string& saved, const std::string& own) {
  if (saved == own) return;
  const auto before = nlohmann::json::parse(saved, nullptr, false);
  const auto now = nlohmann::json::parse(own);
  if (!before.is_object()) throw DataError(kStateWhere, "the checkpoint names no model");
  for (const auto& [key, value] : now.items()) {
    const auto found = before.find(key);
    const std::string was = found == before.end() ? "nothing" : found->dump();
    if (was != value.dump()) {
      throw InvalidArgument(
          kStateWhere, fmt::format("the checkpoint's model has {} {}, the config has {}", key, was,
                                   value.dump()));
    }
  }
  throw InvalidArgument(kStateWhere, "the checkpoint's model has keys that the config's has not");
}

}  // namespace

Trainer::Impl::Impl(const TrainConfig& config, const model::ModelConfig& model,
                    std::shared_ptr<data::Loader> loader, comm::Communicator world,
                    std::shared_ptr<plan::BalanceStrategy> strategy, TrainerHooks hooks)
    : config_(config),
      model_(model),
      loader_(std::move(loader)),
      world_(std::move(world)),
      hooks_(std::move(hooks)),
      cost_fit_(config.cost.value_or(CostModel{})),
      stop_generation_(detail::stop_request_count()) {
  guarded([&] {
    hosts_ = detail::find_hosts(world_);
    explainer_ = std::make_unique<detail::StepExplainer>(world_, hosts_);
    Failure failure;
    try {
      resolve();
    } catch (const std::exception&) {
      failure = detail::current_failure();
    }
    agree(kStateWhere, failure);
    forecast_memory();
    groups_.emplace(world_, placement_);
    try {
      build(std::move(strategy));
    } catch (const std::exception&) {
      failure = detail::current_failure();
    }
    agree(kStateWhere, failure);
    choose_exchanges();
    const std::string print = loader_->fingerprint();
    const std::vector<std::string> prints = detail::gather_text(world_, print);
    failure.reset();
    if (prints.front() != print) {
      failure = {ErrorCode::kData, fmt::format("its documents differ from rank 0's: loader {}, {}",
                                               print, prints.front())};
    }
    agree(kStateWhere, failure);
    resume();
    first_step_ = next_step_;
    state_->gather();
    if (world_.rank() == 0 && resumed_from_.empty()) loader_state_ = loader_->state();
  });
}

void Trainer::Impl::resolve() {
  config_.layout = detail::resolve_layout(config_.layout, world_.size(), kStateWhere);
  config_.resolve(world_.size(), static_cast<int>(model_.layers));
  placement_ = detail::place(model_, config_.layout, config_.parallel, hosts_);
  compile_ = detail::compile_options(placement_, config_.parallel.pipeline);
  if (config_.deterministic && !world_.deterministic()) {
    throw InvalidArgument(kStateWhere,
                          fmt::format("deterministic: the {} communicator reduces in any order; "
                                      "create it with GroupOptions.deterministic",
                                      world_.backend()));
  }
  if (config_.threads == 0) {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    config_.threads = std::max(1, cores / hosts_.local_size);
  }
  at::set_num_threads(config_.threads);
  device_ = detail::parse_device(config_.device, hosts_.local_rank);
  watch_experts();
}

void Trainer::Impl::forecast_memory() {
  detail::MemoryOutlook outlook =
      detail::report_memory(world_, hosts_, placement_, config_, device_);
  memory_ = std::move(outlook.report);
  own_memory_ = outlook.own;
  agreed_ = true;  // all ranks see the same report
  detail::check_memory(memory_, config_.memory_check);
  agreed_ = false;
  if (!memory_.fits()) notices_.push_back(memory_.text());
}

void Trainer::Impl::build(std::shared_ptr<plan::BalanceStrategy> strategy) {
  const c10::DeviceGuard guard(device_);

  stages_ = parallel::build_stages(placement_, groups_->at());
  state_ = std::make_unique<parallel::ModelState>(placement_, *groups_,
                                                  detail::parse_dtype_name(config_.dtype), device_);
  // Masters take the full precision of the source, not of the compute dtype.
  state_->assign([&](const model::ParameterTable& table, at::Tensor& values) {
    if (config_.model.path.empty()) {
      model::initialize_(values, table, model_.initializer_range, config_.seed);
    } else {
      model::load_pretrained(config_.model.path, model_, table, values);
    }
  });
  settings_ = parameter_settings(model::parameter_table(model_, {0, model_.layers}, true, true),
                                 config_.optimizer, config_.rules);
  for (const parallel::ModelState::Part& part : state_->parts()) {
    optimizers_.emplace_back(part.space.table(), settings_, part.space.own_range(),
                             part.space.master(), config_.optimizer);
  }
  const double coefficient = config_.aux_loss_coefficient < 0.0 ? model_.moe.aux_loss_coefficient
                                                                : config_.aux_loss_coefficient;
  if (model_.moe.experts == 0 && config_.aux_loss_coefficient > 0.0) {
    throw InvalidArgument(kStateWhere,
                          fmt::format("aux_loss_coefficient is {}, but the {} model has no experts",
                                      config_.aux_loss_coefficient, model_.model_type));
  }
  constexpr double kBiasUpdateSpeed = 0.001;  // DeepSeek-V3's
  bias_update_speed_ = config_.bias_update_speed;
  if (bias_update_speed_ < 0.0) {
    bias_update_speed_ = model_.moe.correction_bias ? kBiasUpdateSpeed : 0.0;
  } else if (bias_update_speed_ > 0.0 && !model_.moe.correction_bias) {
    throw InvalidArgument(
        kStateWhere, fmt::format("bias_update_speed is {}, but the routers of the {} model have no "
                                 "correction bias",
                                 bias_update_speed_, model_.model_type));
  }
  if (config_.z_loss_coefficient > 0.0 && model_.moe.experts > 0 &&
      model_.moe.score == model::RouterScore::kSigmoid) {
    throw NotSupported(kStateWhere,
                       fmt::format("z_loss_coefficient is {}: a z-loss with the {} model's sigmoid "
                                   "scores is not built",
                                   config_.z_loss_coefficient, model_.model_type));
  }
  if (model_.moe.experts > 0 && coefficient > 0.0) {
    balance_ = model::make_balance_loss(config_.aux_loss, coefficient, model_);
  }
  parallel::ExecutorOptions options;
  options.z_loss_coefficient = config_.z_loss_coefficient;
  options.recompute = model::parse_recompute(config_.parallel.recompute);
  options.spill_folder = config_.offload.folder;
  options.before = hooks_.before;
  if (config_.exchange_dtype != "same") {
    exchange_options_.wire_type = detail::parse_dtype_name(config_.exchange_dtype);
  }
  executor_ = std::make_unique<parallel::Executor>(
      stages_, placement_, *groups_, options, parallel::make_exchange_factory(exchange_options_));

  if (!config_.cost) cost_fit_ = CostRefiner(model_cost(model_));
  fit_costs_ = !config_.cost && !config_.deterministic;
  if (world_.rank() != 0) return;
  if (!strategy) strategy = plan::make_strategy_registry()->create(config_.strategy);
  plan::PlanProblem problem;
  problem.layout = config_.layout;
  problem.capacity_tokens = config_.capacity_tokens;
  problem.ranks_per_node = detail::hdp_ranks_per_node(placement_);
  if (placement_.zero != parallel::Zero::kOptimizer) problem.lockstep = plan::Lockstep::kHdp;
  planner_ = std::make_unique<detail::StepPlanner>(loader_, std::move(strategy), config_.strategy,
                                                   std::move(problem), compile_);
}

/// Figures are measured by all ranks, so not between what may fail on one. In deterministic mode
/// nothing may depend on them: ring, or what the rules name.
void Trainer::Impl::choose_exchanges() {
  std::vector<plan::ExchangeRule> rules = plan::parse_exchange_rules(config_.exchange);
  const bool by_figures = rules.empty() || std::any_of(rules.begin(), rules.end(), [](auto& rule) {
                            return !rule.exchange || *rule.exchange == plan::Exchange::kRingUlysses;
                          });
  std::optional<plan::ExchangeModel> model;
  if (by_figures && config_.layout.hdp > 1 && !config_.deterministic) {
    const at::ScalarType type = detail::parse_dtype_name(config_.dtype);
    const auto element = static_cast<std::int64_t>(c10::elementSize(type));
    const auto wire =
        exchange_options_.wire_type
            ? static_cast<std::int64_t>(c10::elementSize(*exchange_options_.wire_type))
            : element;
    const int tp = config_.layout.tp;
    // Layers may differ; one that sees everything moves most.
    const auto [narrow, wide] = std::minmax_element(model_.windows.begin(), model_.windows.end());
    const std::int64_t window = model_.windows.empty() || *narrow == 0 ? 0 : *wide;
    model = parallel::measure_exchange(
        groups_->hdp(),
        {.shape = {.heads = model_.heads / tp,
                   .key_value_heads =
                       std::gcd(model_.heads / tp, std::max<std::int64_t>(1, model_.kv_heads / tp)),
                   .head_dim = model_.head_dim,
                   .latent_dim = model_.latent.kv_lora_rank > 0
                                     ? model_.latent.kv_lora_rank + model_.latent.qk_rope_head_dim
                                     : 0,
                   .window = window,
                   .element_bytes = element,
                   .wire_bytes = std::min(wire, element),
                   .statistic_bytes = type == at::kDouble ? 8 : 4},
         .type = type,
         .device = device_,
         .layers = static_cast<int>(model_.layers),
         .ranks_per_node = detail::hdp_ranks_per_node(placement_)});
  }
  if (planner_) planner_->set_exchanges(std::move(model), std::move(rules));
}

std::vector<CheckpointPart> Trainer::Impl::shard_states() const {
  std::vector<CheckpointPart> result;
  for (std::size_t i = 0; i < optimizers_.size(); ++i) {
    const parallel::ShardedSpace& space = state_->parts()[i].space;
    result.push_back({.table = space.table(),
                      .range = space.own_range(),
                      .states = {{.name = "master", .values = space.master()},
                                 {.name = "exp_avg", .values = optimizers_[i].exp_avg()},
                                 {.name = "exp_avg_sq", .values = optimizers_[i].exp_avg_sq()}}});
  }
  return result;
}

std::string Trainer::Impl::experts_text() const {
  if (config_.layout.ep == 1) return {};
  return detail::experts_text(state_->experts(),
                              expert_loads_ ? expert_loads_->counts() : detail::ExpertCounts{});
}

CheckpointInfo Trainer::Impl::checkpoint_info() const {
  CheckpointInfo info;
  info.step = next_step_;
  info.layout = config_.layout;
  info.texts = {{"config", config_.to_yaml()},
                {"model", model_.to_json()},
                {"loader", loader_state_},
                {"balance", balance_ ? tensor_text(balance_->state()) : std::string()},
                {"cost", cost_fit_.to_json()},
                {"experts", experts_text()},
                {"transfer", transfer_fit_.to_json()}};
  info.numbers = {{"seed", static_cast<double>(config_.seed)},
                  {"updates", static_cast<double>(optimizers_.front().updates())},
                  {"tokens_seen", tokens_seen_},
                  {"skipped_steps", static_cast<double>(skipped_steps_)}};
  return info;
}

void Trainer::Impl::save_checkpoint() {
  prepare_folder();
  place("checkpoint");
  agreed_ = true;  // write_checkpoint fails on all ranks alike
  write_checkpoint(checkpoints(), checkpoint_info(), shard_states(), config_.checkpoint.keep,
                   world_);
  agreed_ = false;
  saved_step_ = next_step_;
  saved_in_ = checkpoints() + "/" + checkpoint_name(saved_step_);
  saved_at_ = Clock::now();
}

void Trainer::Impl::restore(const CheckpointInfo& info) {
  const auto number = [&](const char* name) {
    const auto found = info.numbers.find(name);
    if (found == info.numbers.end()) {
      throw DataError(kStateWhere, fmt::format("the checkpoint has no number \"{}\"", name));
    }
    return found->second;
  };
  for (AdamW& optimizer : optimizers_) {
    optimizer.set_updates(static_cast<std::int64_t>(number("updates")));
  }
  tokens_seen_ = number("tokens_seen");
  skipped_steps_ = static_cast<std::int64_t>(number("skipped_steps"));
  if (!config_.cost) cost_fit_ = CostRefiner::from_json(info_text(info, "cost"));
  if (!info_text(info, "transfer").empty()) {
    transfer_fit_ = TransferRefiner::from_json(info_text(info, "transfer"));
  }
  if (balance_ && !info_text(info, "balance").empty()) {
    balance_->load_state(parse_tensor(info_text(info, "balance"), device_));
  }
  loader_state_ = info_text(info, "loader");
  if (world_.rank() == 0) loader_->restore(loader_state_);
  next_step_ = info.step;
  saved_step_ = info.step;
}

bool Trainer::Impl::try_resume(const std::string& folder, Failure& failure) {
  failure.reset();
  try {
    const CheckpointReader reader(folder);
    check_same_model(info_text(reader.info(), "model"), model_.to_json());
    detail::SavedExperts experts =
        detail::parse_experts(info_text(reader.info(), "experts"), placement_.experts);
    state_->place_experts(experts.maps);
    settle_optimizers();
    if (expert_loads_) expert_loads_->restore(std::move(experts.loads));
    for (const CheckpointPart& part : shard_states()) {
      for (const ShardState& state : part.states) {
        at::Tensor values = state.values;
        reader.read(part.table, part.range, state.name, values);
      }
    }
    restore(reader.info());
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  failure = detail::first_failure(world_, failure);
  return !failure;
}

void Trainer::Impl::resume() {
  if (config_.checkpoint.resume == "no") return;
  // Rank 0 lists, so that all ranks try the same folders.
  std::string listing;
  on_rank_0(kStateWhere, [&] {
    listing = fmt::format("{}", fmt::join(list_checkpoints(checkpoints()), "\n"));
    if (!listing.empty()) lock_folder();  // nobody may remove them, or add newer ones
  });
  listing = detail::broadcast_text(world_, listing, 0);
  Failure failure;
  std::size_t at = 0;
  while (at < listing.size()) {
    const std::size_t end = std::min(listing.find('\n', at), listing.size());
    const std::string folder = listing.substr(at, end - at);
    at = end + 1;
    if (try_resume(folder, failure)) {
      resumed_from_ = folder;
      saved_in_ = folder;
      return;
    }
    if (failure->code == ErrorCode::kInvalidArgument) break;  // good, but of another run
    notices_.push_back(fmt::format("checkpoint {} was passed over: {}", folder, failure->message));
    if (config_.checkpoint.resume == "strict") break;
  }
  if (!failure) return;
  agreed_ = true;
  throw_error(failure->code, kStateWhere,
              fmt::format("no checkpoint in {} can be continued: {}; move the folder away or set "
                          "checkpoint.resume: no to start over",
                          checkpoints(), failure->message));
}

}  // namespace meshloom::train
