#include "meshloom/parallel/executor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/activation_store.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/model/token_dispatcher.h"
#include "meshloom/parallel/gather_exchange.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/ulysses_exchange.h"

namespace meshloom::parallel {
namespace {

using Clock = std::chrono::steady_clock;

/// One slot's work on this rank, from load to backward.
struct MicroBatch {
  model::SequenceBatch batch;
  std::unique_ptr<model::AttentionExchange> attention;
  std::unique_ptr<model::TokenDispatcher> dispatcher;
  model::ResidentActivations activations;
};

std::string describe(const plan::StepPlan& plan, const plan::Instruction& instruction) {
  auto text = fmt::format("step {}, {}", plan.step, plan::to_string(instruction.op));
  if (instruction.slot < 0) return text;
  text += fmt::format(", slot {}", instruction.slot);
  if (instruction.unit < 0) return text + ", idle";
  const auto& unit = plan.slots[static_cast<std::size_t>(instruction.slot)]
                         .units[static_cast<std::size_t>(instruction.unit)];
  constexpr std::size_t kShown = 8;
  const auto shown = std::min(unit.samples.size(), kShown);
  text += fmt::format(", unit {} (ranks {}; samples {}{})", instruction.unit,
                      fmt::join(unit.ranks, ","),
                      fmt::join(unit.samples.begin(), unit.samples.begin() + shown, ","),
                      shown < unit.samples.size() ? ",..." : "");
  return text;
}

/// What is planned, verified and simulated, but not executed yet, by name.
void refuse_layout(const plan::StepPlan& plan, bool dispatches) {
  const auto refuse = [&](const char* what) {
    throw NotSupported("parallel.executor",
                       fmt::format("layout {}: {} is not built; hdp and ep may be above 1",
                                   plan.layout.to_string(), what));
  };
  if (plan.layout.tp > 1) refuse("tensor parallelism (tp)");
  if (plan.layout.pp > 1) refuse("pipeline parallelism (pp)");
  if (plan.layout.ep > 1 && !dispatches) refuse("expert parallelism (ep) without a dispatcher");
  if (plan.layout.chunks > 1) refuse("more than one model chunk a rank (chunks)");
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    for (std::size_t u = 0; u < plan.slots[s].units.size(); ++u) {
      const auto& unit = plan.slots[s].units[u];
      if (unit.offload > 0.0) {
        throw NotSupported(
            "parallel.executor",
            fmt::format("slot {}, unit {}: offload {} is not built", s, u, unit.offload));
      }
    }
  }
}

/// Adds `counts` over the ranks of a unit: every member sends to every other and adds in ring
/// order, so that all have the same sum.
void sum_over_unit_(comm::Communicator& hdp, const plan::Unit& unit, at::Tensor& counts) {
  const at::Tensor own = counts.contiguous();
  at::Tensor parts = at::empty({std::ssize(unit.ranks), own.numel()}, own.options());
  std::vector<at::Tensor> received;
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  received.reserve(unit.ranks.size());
  for (std::size_t i = 0; i < unit.ranks.size(); ++i) {
    received.push_back(parts[static_cast<std::int64_t>(i)].view(own.sizes()));
    if (unit.ranks[i] == hdp.rank()) {
      received.back().copy_(own);
      continue;
    }
    sends.push_back({.peer = unit.ranks[i], .tensor = &own});
    receives.push_back({.peer = unit.ranks[i], .tensor = &received.back()});
  }
  hdp.send_receive(sends, receives, {.timeout = std::nullopt, .purpose = "balance"}).wait();
  counts.zero_();
  for (const at::Tensor& part : received) counts.add_(part);
}

/// Counts routing on its way to the balance loss.
class RoutingCounter final : public model::RouterBalance {
 public:
  RoutingCounter(model::RouterBalance* balance, at::Tensor& counts)
      : balance_(balance), counts_(counts) {}
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const model::SequenceBatch& batch) override {
    if (counts_.defined()) {
      counts_[layer].add_(at::bincount(experts.reshape({-1}), {}, counts_.size(1)));
    }
    if (balance_ == nullptr) return {};
    return balance_->observe(layer, probabilities, experts, batch);
  }

 private:
  model::RouterBalance* balance_;
  at::Tensor& counts_;
};

/// The rank's place in the plan for the flight recorder.
comm::Label label_of(const plan::StepPlan& plan, const plan::Instruction& instruction) {
  comm::Label label;
  label.step = plan.step;
  label.instruction = plan::to_string(instruction.op);
  label.slot = instruction.slot;
  label.unit = instruction.unit;
  if (instruction.slot >= 0 && instruction.unit >= 0) {
    label.samples = plan.slots[static_cast<std::size_t>(instruction.slot)]
                        .units[static_cast<std::size_t>(instruction.unit)]
                        .samples;
  }
  return label;
}

/// Says in the flight recorder what this rank is doing, and clears it however the step ends.
class RecorderLabel {
 public:
  explicit RecorderLabel(const comm::Communicator& hdp) : recorder_(hdp.recorder()) {}
  RecorderLabel(const RecorderLabel&) = delete;
  RecorderLabel& operator=(const RecorderLabel&) = delete;
  ~RecorderLabel() { recorder_.set_label({}); }
  void set(comm::Label label) { recorder_.set_label(std::move(label)); }

 private:
  comm::FlightRecorder& recorder_;
};

}  // namespace

std::unique_ptr<model::AttentionExchange> make_exchange(const comm::Communicator& hdp,
                                                        const plan::Unit& unit, SpanSink spans,
                                                        std::shared_ptr<ExchangeBuffers> buffers) {
  switch (unit.exchange) {
    case plan::Exchange::kLocal:
      return std::make_unique<model::LocalAttention>();
    case plan::Exchange::kRing:
      return std::make_unique<RingExchange>(hdp, unit.ranks, std::move(spans), std::move(buffers));
    case plan::Exchange::kAllGather:
      return std::make_unique<GatherExchange>(hdp, unit.ranks, std::move(spans));
    case plan::Exchange::kUlysses:
      return std::make_unique<UlyssesExchange>(hdp, unit.ranks, std::move(spans));
    default:
      throw NotSupported(
          "parallel.make_exchange",
          fmt::format("exchange \"{}\" is not built; built are ring, all_gather and ulysses",
                      plan::to_string(unit.exchange)));
  }
}

class Executor::Impl {
 public:
  Impl(std::shared_ptr<model::Stage> stage, comm::Communicator hdp, ExecutorOptions options,
       ExchangeFactory exchange, DispatcherFactory dispatcher)
      : stage_(std::move(stage)),
        hdp_(std::move(hdp)),
        options_(std::move(options)),
        exchange_(std::move(exchange)),
        dispatcher_(std::move(dispatcher)) {}

  struct Step {
    const plan::StepPlan& plan;
    const SampleLoader& load;
    ParameterState& state;
    model::RouterBalance* balance;
    const std::function<void()>& on_step;
    bool training;
    double loss_weight;
    double z_loss_weight;
    StepOutcome outcome;
    std::map<std::pair<int, int>, MicroBatch> in_flight;  // (slot, chunk)
    RoutingCounter* routing = nullptr;
  };

  StepOutcome run(Step step, const plan::Program& program) {
    refuse_layout(step.plan, static_cast<bool>(dispatcher_));
    MESHLOOM_CHECK_EQ(step.plan.layout.hdp, hdp_.size(), "parallel.executor",
                      "hdp of the plan and ranks of the communicator");
    MESHLOOM_CHECK_EQ(program.rank, hdp_.rank(), "parallel.executor",
                      "rank of the program and of the communicator");
    const model::ModelConfig& config = stage_->config();
    if (step.training && config.moe.experts > 0) {
      step.outcome.expert_counts =
          at::zeros({config.layers, config.moe.experts},
                    at::TensorOptions().dtype(at::kDouble).device(step.state.device()));
    }
    RoutingCounter routing(step.balance, step.outcome.expert_counts);
    step.routing = &routing;
    if (step.training) step.state.zero_gradients();
    RecorderLabel recorder(hdp_);
    for (const auto& instruction : program.instructions) {
      try {
        recorder.set(label_of(step.plan, instruction));
        const auto begin = Clock::now();
        if (options_.before) options_.before(instruction);
        const auto kind = execute(step, instruction);
        if (options_.record_spans) {
          record(step, kind, instruction, begin, Clock::now());
        }
      } catch (const Error& error) {
        const auto where = describe(step.plan, instruction);
        const auto message =
            fmt::format("rank {}/{} in {}: {}", hdp_.rank(), hdp_.size(), where, error.what());
        hdp_.abort(message);
        throw_error(error.code(), "parallel.executor", message, error.location());
      } catch (const std::exception& error) {
        const auto where = describe(step.plan, instruction);
        hdp_.abort(
            fmt::format("rank {}/{} in {}: {}", hdp_.rank(), hdp_.size(), where, error.what()));
        throw;
      }
    }
    return std::move(step.outcome);
  }

 private:
  static void record(Step& step, Span::Kind kind, const plan::Instruction& instruction,
                     Clock::time_point begin, Clock::time_point end) {
    step.outcome.spans.push_back({.kind = kind,
                                  .begin = begin,
                                  .end = end,
                                  .slot = instruction.slot,
                                  .unit = instruction.unit});
  }

  Span::Kind execute(Step& step, const plan::Instruction& instruction) {
    switch (instruction.op) {
      case plan::Op::kLoad:
        load(step, instruction);
        return Span::Kind::kLoad;
      case plan::Op::kForward:
        forward(step, instruction);
        return Span::Kind::kForward;
      case plan::Op::kBackward:
        if (step.training) backward(step, instruction);
        return Span::Kind::kBackward;
      case plan::Op::kReduce:
        if (step.training) step.state.reduce();
        return Span::Kind::kReduce;
      case plan::Op::kStep:
        if (step.training) {
          step.on_step();
          step.state.gather();
        }
        return Span::Kind::kStep;
      case plan::Op::kSend:
      case plan::Op::kReceive:
      case plan::Op::kWeightGradient:
        break;
    }
    throw NotSupported("parallel.executor", fmt::format("instruction \"{}\" is not built",
                                                        plan::to_string(instruction.op)));
  }

  void load(Step& step, const plan::Instruction& instruction) {
    auto& micro = step.in_flight[{instruction.slot, instruction.chunk}];
    const auto device = step.state.device();
    SpanSink sink;
    if (options_.record_spans) {
      sink = [&step, instruction](Span::Kind kind, Clock::time_point begin, Clock::time_point end) {
        record(step, kind, instruction, begin, end);
      };
    }
    micro.dispatcher = dispatcher_ ? dispatcher_(sink) : std::make_unique<model::LocalDispatcher>();
    if (instruction.unit < 0) {
      micro.batch = empty_batch(device);
      micro.attention = std::make_unique<model::LocalAttention>();
      return;
    }
    const auto& unit = step.plan.slots[static_cast<std::size_t>(instruction.slot)]
                           .units[static_cast<std::size_t>(instruction.unit)];
    const auto own = std::find(unit.ranks.begin(), unit.ranks.end(), hdp_.rank());
    if (own == unit.ranks.end()) {
      throw PlanError("parallel.executor", "the program loads a unit without this rank");
    }
    micro.batch = build_batch(step.plan, unit, static_cast<int>(own - unit.ranks.begin()),
                              step.load, device, stage_->config().vocab_size);
    micro.attention = exchange_(hdp_, unit, std::move(sink), buffers_);
  }

  /// The sequence form counts over whole documents, which a unit may hold in slices.
  void share_counts(Step& step, const plan::Instruction& instruction) {
    auto* sequence = dynamic_cast<model::SequenceBalance*>(step.balance);
    if (sequence == nullptr) return;
    sequence->set_unit_sum({});
    if (instruction.unit < 0) return;
    const auto& unit = step.plan.slots[static_cast<std::size_t>(instruction.slot)]
                           .units[static_cast<std::size_t>(instruction.unit)];
    if (unit.ranks.size() < 2) return;
    sequence->set_unit_sum(
        [this, &unit](at::Tensor& counts) { sum_over_unit_(hdp_, unit, counts); });
  }

  model::StageContext context(Step& step, MicroBatch& micro) {
    return {.batch = micro.batch,
            .parameters = step.state.source(),
            .attention = *micro.attention,
            .dispatcher = *micro.dispatcher,
            .linear = linear_,
            .balance = step.routing,
            .gradients = step.training ? &step.state.sink() : nullptr,
            .activations = step.training ? &micro.activations : nullptr,
            .loss_weight = step.loss_weight,
            .z_loss_weight = step.z_loss_weight};
  }

  void forward(Step& step, const plan::Instruction& instruction) {
    const auto key = std::pair(instruction.slot, instruction.chunk);
    auto& micro = step.in_flight.at(key);
    share_counts(step, instruction);
    const auto output = stage_->forward(context(step, micro), {});
    step.outcome.loss_sum += output.loss_sum;
    step.outcome.z_loss_sum += output.z_loss_sum;
    step.outcome.tokens += micro.batch.size();
    step.outcome.units.push_back({.slot = instruction.slot,
                                  .unit = instruction.unit,
                                  .tokens = micro.batch.size(),
                                  .loss_sum = output.loss_sum});
    if (!step.training) step.in_flight.erase(key);
  }

  void backward(Step& step, const plan::Instruction& instruction) {
    const auto key = std::pair(instruction.slot, instruction.chunk);
    auto& micro = step.in_flight.at(key);
    stage_->backward(context(step, micro), {});
    step.in_flight.erase(key);
  }

  std::shared_ptr<model::Stage> stage_;
  comm::Communicator hdp_;
  ExecutorOptions options_;
  ExchangeFactory exchange_;
  std::shared_ptr<ExchangeBuffers> buffers_ = std::make_shared<ExchangeBuffers>();
  DispatcherFactory dispatcher_;
  model::LocalLinear linear_;

  friend class Executor;
};

Executor::Executor(std::shared_ptr<model::Stage> stage, comm::Communicator hdp,
                   ExecutorOptions options, ExchangeFactory exchange, DispatcherFactory dispatcher)
    : impl_(std::make_unique<Impl>(std::move(stage), std::move(hdp), std::move(options),
                                   std::move(exchange), std::move(dispatcher))) {}

Executor::~Executor() = default;

StepOutcome Executor::run(const plan::StepPlan& plan, const plan::Program& program,
                          const SampleLoader& load, ParameterState& state,
                          model::RouterBalance* balance, const std::function<void()>& on_step) {
  const auto loss_tokens = plan.total_loss_tokens();
  MESHLOOM_CHECK_GT(loss_tokens, 0, "parallel.executor", "loss tokens of the step");
  return impl_->run({.plan = plan,
                     .load = load,
                     .state = state,
                     .balance = balance,
                     .on_step = on_step,
                     .training = true,
                     .loss_weight = 1.0 / static_cast<double>(loss_tokens),
                     .z_loss_weight = impl_->options_.z_loss_coefficient /
                                      static_cast<double>(plan.total_tokens()),
                     .outcome = {},
                     .in_flight = {}},
                    program);
}

StepOutcome Executor::evaluate(const plan::StepPlan& plan, const plan::Program& program,
                               const SampleLoader& load, ParameterState& state,
                               model::RouterBalance* balance) {
  const std::function<void()> none;
  return impl_->run({.plan = plan,
                     .load = load,
                     .state = state,
                     .balance = balance,
                     .on_step = none,
                     .training = false,
                     .loss_weight = 1.0,
                     .z_loss_weight = 0.0,
                     .outcome = {},
                     .in_flight = {}},
                    program);
}

}  // namespace meshloom::parallel
