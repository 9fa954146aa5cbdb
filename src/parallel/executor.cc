#include "meshloom/parallel/executor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <iterator>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/activation_store.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/model/token_dispatcher.h"
#include "meshloom/parallel/expert_dispatcher.h"
#include "meshloom/parallel/tensor_parallel.h"
#include "parallel/internal/deferred_gradients.h"
#include "parallel/internal/place_in_plan.h"
#include "parallel/internal/routing_sums.h"

namespace meshloom::parallel {
namespace {

using detail::RecorderLabel;
using detail::RoutingCounter;
using Clock = std::chrono::steady_clock;

constexpr comm::CallOptions kPipelineCall{.timeout = std::nullopt, .purpose = "pipeline"};

/// One slot's work on this rank, from load to the last backward.
struct SlotWork {
  model::SequenceBatch batch;
  model::SequenceBatch stream;  ///< documents of the rows that this rank has of the stream
  std::unique_ptr<model::AttentionExchange> attention;
  std::unique_ptr<model::TokenDispatcher> dispatcher;
  std::unique_ptr<model::ShardedLinear> linear;
  int open_chunks = 0;  ///< model chunks that still need it
};

struct ChunkWork {  ///< what one chunk of it keeps between forward and backward
  std::unique_ptr<model::ActivationStore> activations;
  detail::DeferredGradients deferred;
};

struct Passage {  ///< a tensor on its way between stages
  at::Tensor tensor;
  comm::Work work;
};

}  // namespace

class Executor::Impl {
 public:
  Impl(std::vector<std::shared_ptr<model::Stage>> stages, const ModelPlacement& placement,
       Groups groups, ExecutorOptions options, ExchangeFactory exchange)
      : stages_(std::move(stages)),
        groups_(std::move(groups)),
        places_(placement.chunks(groups_.at().pp)),
        options_(std::move(options)),
        exchange_(std::move(exchange)),
        offload_(options_.spill_folder) {
    MESHLOOM_CHECK_EQ(stages_.size(), places_.size(), "parallel.executor",
                      "stages and model chunks of a rank");
    MESHLOOM_CHECK(std::all_of(stages_.begin(), stages_.end(), [](const auto& s) { return !!s; }),
                   "parallel.executor", "a stage is missing");
    for (std::size_t c = 0; c < places_.size(); ++c) {
      const auto beside = [&](int step) {
        for (std::size_t other = 0; other < places_.size(); ++other) {
          if (places_[other].piece == places_[c].piece + step) return static_cast<int>(other);
        }
        return kElsewhere;
      };
      neighbours_.push_back({beside(-1), beside(1)});
      reads_tokens_ = reads_tokens_ || places_[c].with_embedding || places_[c].with_head;
    }
    sharded_ = placement.zero != Zero::kOptimizer && groups_.hdp().size() > 1;
  }

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
    std::vector<const plan::Instruction*> last_gradients;  // [chunk]
    std::map<int, SlotWork> slots;
    std::map<std::pair<int, int>, ChunkWork> chunks;  // (slot, chunk)
    /// By (slot, chunk that takes it or gives it, gradient or activation).
    std::map<std::tuple<int, int, bool>, Passage> arriving;
    std::map<std::tuple<int, int, bool>, at::Tensor> leaving;
    std::deque<Passage> sent;
    RoutingCounter* routing = nullptr;
  };

  StepOutcome run(Step step, const plan::Program& program) {
    comm::Communicator& world = groups_.world();
    MESHLOOM_CHECK(step.plan.layout == groups_.layout(), "parallel.executor",
                   fmt::format("the plan is for layout {}, the ranks have {}",
                               step.plan.layout.to_string(), groups_.layout().to_string()));
    MESHLOOM_CHECK_EQ(program.rank, world.rank(), "parallel.executor",
                      "rank of the program and of the communicator");
    MESHLOOM_CHECK(!sharded_ || step.plan.lockstep == plan::Lockstep::kHdp, "parallel.executor",
                   "gradients or parameters are sharded (zero 2 or 3) and the plan is not in "
                   "lockstep; plan with lockstep hdp");
    const model::ModelConfig& config = stages_.front()->config();
    check_offload(step.plan, config.layers);
    if (step.training && config.moe.experts > 0) {
      step.outcome.expert_counts =
          at::zeros({config.layers, config.moe.experts},
                    at::TensorOptions().dtype(at::kDouble).device(step.state.device()));
    }
    RoutingCounter routing(step.balance, step.outcome.expert_counts);
    step.routing = &routing;
    step.last_gradients = detail::last_gradients(program, groups_.layout().chunks);
    if (step.training) step.state.zero_gradients();
    offload_.begin_step(step.plan.memory, config.layers);
    RecorderLabel recorder(world);
    for (const auto& instruction : program.instructions) {
      try {
        recorder.set(detail::label_of(step.plan, instruction));
        const auto begin = Clock::now();
        if (options_.before) options_.before(instruction);
        prepare_offload(step, program, instruction);
        const auto kind = execute(step, instruction);
        if (kind && options_.record_spans) {
          record(step, *kind, instruction, begin, Clock::now());
        }
      } catch (const Error& error) {
        const std::string message = blame(step.plan, instruction, error.what());
        world.abort(message);
        throw_error(error.code(), "parallel.executor", message, error.location());
      } catch (const std::exception& error) {
        world.abort(blame(step.plan, instruction, error.what()));
        throw;
      }
    }
    for (Passage& passage : step.sent) passage.work.wait();
    if (step.training) step.outcome.offload = offload_.outcome();
    return std::move(step.outcome);
  }

  const ExecutorOptions& options() const { return options_; }

 private:
  std::string blame(const plan::StepPlan& plan, const plan::Instruction& instruction,
                    const char* what) {
    return fmt::format("rank {}/{} in {}: {}", groups_.world().rank(), groups_.world().size(),
                       detail::describe(plan, instruction), what);
  }

  static void record(Step& step, Span::Kind kind, const plan::Instruction& instruction,
                     Clock::time_point begin, Clock::time_point end) {
    step.outcome.spans.push_back({.kind = kind,
                                  .begin = begin,
                                  .end = end,
                                  .slot = instruction.slot,
                                  .unit = instruction.unit});
  }

  SpanSink sink_for(Step& step, const plan::Instruction& instruction) const {
    if (!options_.record_spans) return {};
    return [&step, instruction](Span::Kind kind, Clock::time_point begin, Clock::time_point end) {
      record(step, kind, instruction, begin, end);
    };
  }

  /// Names the backward that follows an instruction, so that what it needs is fetched in time.
  void prepare_offload(Step& step, const plan::Program& program,
                       const plan::Instruction& instruction) {
    offload_.set_spans(sink_for(step, instruction));
    const plan::Instruction* const next = detail::backward_after(program, instruction);
    const auto found =
        next == nullptr ? step.chunks.end() : step.chunks.find({next->slot, next->chunk});
    offload_.set_upcoming(found == step.chunks.end() ? nullptr : found->second.activations.get());
  }

  /// @returns what the time was spent on; nothing for an instruction that posts a transfer or that
  ///   evaluation leaves out.
  std::optional<Span::Kind> execute(Step& step, const plan::Instruction& instruction) {
    switch (instruction.op) {
      case plan::Op::kLoad:
        load(step, instruction);
        return Span::Kind::kLoad;
      case plan::Op::kForward:
        forward(step, instruction);
        return Span::Kind::kForward;
      case plan::Op::kBackward:
        if (!step.training) return std::nullopt;
        backward(step, instruction);
        return Span::Kind::kBackward;
      case plan::Op::kWeightGradient:
        if (!step.training) return std::nullopt;
        weight_gradient(step, instruction);
        return Span::Kind::kBackward;
      case plan::Op::kSend:
        if (step.training || !instruction.gradient) send(step, instruction);
        return std::nullopt;
      case plan::Op::kReceive:
        if (step.training || !instruction.gradient) receive(step, instruction);
        return std::nullopt;
      case plan::Op::kReduce:
        if (step.training) step.state.reduce();
        return Span::Kind::kReduce;
      case plan::Op::kStep:
        if (step.training) {
          step.on_step();
          step.state.gather();
        }
        return Span::Kind::kStep;
    }
    throw NotSupported("parallel.executor", fmt::format("instruction \"{}\" is not built",
                                                        plan::to_string(instruction.op)));
  }

  [[nodiscard]] static const plan::Unit& unit_of(const Step& step,
                                                 const plan::Instruction& instruction) {
    return step.plan.slots[static_cast<std::size_t>(instruction.slot)]
        .units[static_cast<std::size_t>(instruction.unit)];
  }

  [[nodiscard]] int member_of(const plan::Unit& unit) {
    const auto own = std::find(unit.ranks.begin(), unit.ranks.end(), groups_.at().hdp);
    if (own == unit.ranks.end()) {
      throw PlanError("parallel.executor", "the program runs a unit without this rank");
    }
    return static_cast<int>(own - unit.ranks.begin());
  }

  void load(Step& step, const plan::Instruction& instruction) {
    SlotWork& slot = step.slots[instruction.slot];
    slot.open_chunks = groups_.layout().chunks;
    const auto device = step.state.device();
    SpanSink sink = sink_for(step, instruction);
    if (groups_.experts()) {
      slot.dispatcher =
          std::make_unique<ExpertDispatcher>(*groups_.experts(), step.state.experts(), sink);
    } else {
      slot.dispatcher = std::make_unique<model::LocalDispatcher>();
    }
    const std::int64_t vocabulary = stages_.front()->config().vocab_size;
    if (instruction.unit < 0) {
      slot.batch = empty_batch(device);
      slot.attention = std::make_unique<model::LocalAttention>();
    } else {
      const plan::Unit& unit = unit_of(step, instruction);
      slot.batch = build_batch(step.plan, unit, member_of(unit),
                               reads_tokens_ ? step.load : SampleLoader(), device, vocabulary);
      slot.attention = exchange_(groups_.hdp(), unit, sink, buffers_);
    }
    if (groups_.layout().tp > 1) {
      slot.linear = std::make_unique<TensorParallel>(groups_.tensor(), slot.batch.size(),
                                                     vocabulary, std::move(sink));
    } else {
      slot.linear = std::make_unique<model::LocalLinear>();
    }
    slot.stream = stream_of(slot.batch, slot.linear->own_rows(slot.batch.size()));
  }

  /// The sequence form counts over whole documents, which a unit and a tensor-parallel group may
  /// hold in slices.
  void share_counts(Step& step, const plan::Instruction& instruction) {
    auto* sequence = dynamic_cast<model::SequenceBalance*>(step.balance);
    if (sequence == nullptr) return;
    sequence->set_unit_sum({});
    if (instruction.unit < 0) return;
    const plan::Unit& unit = unit_of(step, instruction);
    if (unit.ranks.size() < 2 && groups_.layout().tp == 1) return;
    sequence->set_unit_sum([this, &unit](at::Tensor& counts) {
      if (groups_.layout().tp > 1) {
        groups_.tensor()
            .all_reduce_(counts, comm::ReduceOp::kSum,
                         {.timeout = std::nullopt, .purpose = "balance"})
            .wait();
      }
      if (unit.ranks.size() > 1) detail::sum_over_unit_(groups_.hdp(), unit, counts);
    });
  }

  model::StageContext context(Step& step, SlotWork& slot, ChunkWork& work, int chunk,
                              model::WeightGradSink& sink) {
    return {.batch = slot.batch,
            .stream = slot.stream,
            .parameters = step.state.source(chunk),
            .attention = *slot.attention,
            .dispatcher = *slot.dispatcher,
            .linear = *slot.linear,
            .balance = step.routing,
            .gradients = step.training ? &sink : nullptr,
            .activations = work.activations.get(),
            .loss_weight = step.loss_weight,
            .z_loss_weight = step.z_loss_weight,
            .recompute = options_.recompute};
  }

  /// What the neighbouring piece of the model made for this chunk: of this rank, or received.
  at::Tensor take(Step& step, const plan::Instruction& instruction, bool gradient) {
    const auto at = static_cast<std::size_t>(instruction.chunk);
    const int neighbour = gradient ? neighbours_[at].after : neighbours_[at].before;
    if (neighbour != kElsewhere) {
      auto found = step.leaving.extract({instruction.slot, neighbour, gradient});
      MESHLOOM_CHECK(!found.empty(), "parallel.executor", "a chunk runs before its neighbour");
      return std::move(found.mapped());
    }
    auto found = step.arriving.extract({instruction.slot, instruction.chunk, gradient});
    if (found.empty()) {  // an idle member of a lockstep group: nothing is sent
      const SlotWork& slot = step.slots.at(instruction.slot);
      MESHLOOM_CHECK(instruction.unit < 0, "parallel.executor", "nothing was received");
      return at::empty({slot.linear->own_rows(0).size(), stages_.front()->config().hidden_size},
                       at::TensorOptions().dtype(step.state.compute()).device(step.state.device()));
    }
    const auto waiting = Clock::now();
    found.mapped().work.wait();
    if (options_.record_spans) {
      record(step, Span::Kind::kPipeline, instruction, waiting, Clock::now());
    }
    return std::move(found.mapped().tensor);
  }

  /// Keeps what a chunk made until it is sent or the neighbour on this rank takes it.
  void give(Step& step, const plan::Instruction& instruction, at::Tensor tensor, bool gradient) {
    const int neighbour = gradient ? neighbours_[static_cast<std::size_t>(instruction.chunk)].before
                                   : neighbours_[static_cast<std::size_t>(instruction.chunk)].after;
    if (instruction.unit < 0 && neighbour == kElsewhere) return;
    step.leaving[{instruction.slot, instruction.chunk, gradient}] = std::move(tensor);
  }

  void send(Step& step, const plan::Instruction& instruction) {
    auto found = step.leaving.extract({instruction.slot, instruction.chunk, instruction.gradient});
    MESHLOOM_CHECK(!found.empty(), "parallel.executor", "nothing is there to send");
    Passage passage{.tensor = found.mapped().contiguous(), .work = {}};
    const comm::Transfer transfer{.peer = groups_.layout().coordinates(instruction.peer).pp,
                                  .tensor = &passage.tensor};
    passage.work = groups_.pipeline().send_receive({&transfer, 1}, {}, kPipelineCall);
    step.sent.push_back(std::move(passage));
    while (!step.sent.empty() && step.sent.front().work.done()) {
      step.sent.front().work.wait();
      step.sent.pop_front();
    }
  }

  void receive(Step& step, const plan::Instruction& instruction) {
    const plan::Unit& unit = unit_of(step, instruction);
    const std::int64_t tokens = member_tokens(step.plan, unit, member_of(unit));
    const auto [begin, end] =
        model::shard_range(tokens, {.rank = groups_.at().tp, .ranks = groups_.layout().tp});
    Passage passage{
        .tensor =
            at::empty({end - begin, stages_.front()->config().hidden_size},
                      at::TensorOptions().dtype(step.state.compute()).device(step.state.device())),
        .work = {}};
    const comm::Transfer transfer{.peer = groups_.layout().coordinates(instruction.peer).pp,
                                  .tensor = &passage.tensor};
    passage.work = groups_.pipeline().send_receive({}, {&transfer, 1}, kPipelineCall);
    step.arriving[{instruction.slot, instruction.chunk, instruction.gradient}] = std::move(passage);
  }

  void forward(Step& step, const plan::Instruction& instruction) {
    const int chunk = instruction.chunk;
    const ChunkPlace& place = places_[static_cast<std::size_t>(chunk)];
    SlotWork& slot = step.slots.at(instruction.slot);
    ChunkWork& work = step.chunks[{instruction.slot, chunk}];
    if (step.training) {
      const double ratio = instruction.unit < 0 ? 0.0 : unit_of(step, instruction).offload;
      work.activations = offload_.make_store(ratio, place.layers);
    }
    share_counts(step, instruction);
    const at::Tensor input =
        place.with_embedding ? at::Tensor() : take(step, instruction, /*gradient=*/false);
    step.state.begin_pass(chunk, Pass::kForward, false);
    model::StageOutput output = stages_[static_cast<std::size_t>(chunk)]->forward(
        context(step, slot, work, chunk, step.state.sink(chunk)), input);
    step.state.end_pass(chunk);
    step.outcome.z_loss_sum += output.z_loss_sum;
    if (!place.with_head) {
      give(step, instruction, std::move(output.hidden), /*gradient=*/false);
    } else if (groups_.at().tp == 0) {
      step.outcome.loss_sum += output.loss_sum;
      step.outcome.tokens += slot.batch.size();
      step.outcome.units.push_back({.slot = instruction.slot,
                                    .unit = instruction.unit,
                                    .tokens = slot.batch.size(),
                                    .loss_sum = output.loss_sum});
    }
    if (!step.training) close(step, instruction);
  }

  void backward(Step& step, const plan::Instruction& instruction) {
    const int chunk = instruction.chunk;
    const ChunkPlace& place = places_[static_cast<std::size_t>(chunk)];
    SlotWork& slot = step.slots.at(instruction.slot);
    ChunkWork& work = step.chunks.at({instruction.slot, chunk});
    const bool deferred = instruction.defer_weight_gradient;
    const at::Tensor dhidden =
        place.with_head ? at::Tensor() : take(step, instruction, /*gradient=*/true);
    model::WeightGradSink& sink =
        deferred ? static_cast<model::WeightGradSink&>(work.deferred) : step.state.sink(chunk);
    step.state.begin_pass(chunk, Pass::kBackward, is_last(step, instruction));
    at::Tensor dinput = stages_[static_cast<std::size_t>(chunk)]->backward(
        context(step, slot, work, chunk, sink), dhidden);
    step.state.end_pass(chunk);
    if (!place.with_embedding) give(step, instruction, std::move(dinput), /*gradient=*/true);
    if (!deferred) close(step, instruction);
  }

  void weight_gradient(Step& step, const plan::Instruction& instruction) {
    const int chunk = instruction.chunk;
    step.state.begin_pass(chunk, Pass::kWeightGradient, is_last(step, instruction));
    step.chunks.at({instruction.slot, chunk}).deferred.replay(step.state.sink(chunk));
    step.state.end_pass(chunk);
    close(step, instruction);
  }

  [[nodiscard]] static bool is_last(const Step& step, const plan::Instruction& instruction) {
    return step.last_gradients[static_cast<std::size_t>(instruction.chunk)] == &instruction;
  }

  /// A chunk is through with a slot.
  static void close(Step& step, const plan::Instruction& instruction) {
    step.chunks.erase({instruction.slot, instruction.chunk});
    const auto slot = step.slots.find(instruction.slot);
    if (--slot->second.open_chunks == 0) step.slots.erase(slot);
  }

  static constexpr int kElsewhere = -1;
  /// The chunks of this rank that hold the pieces of the model before and after a chunk's.
  struct Neighbours {
    int before = kElsewhere;
    int after = kElsewhere;
  };

  std::vector<std::shared_ptr<model::Stage>> stages_;  // [chunk]
  Groups groups_;
  std::vector<ChunkPlace> places_;  // [chunk]
  std::vector<Neighbours> neighbours_;
  bool reads_tokens_ = false;
  bool sharded_ = false;  ///< gradients or parameters
  ExecutorOptions options_;
  ExchangeFactory exchange_;
  ActivationOffload offload_;
  std::shared_ptr<ExchangeBuffers> buffers_ = std::make_shared<ExchangeBuffers>();
};

Executor::Executor(std::vector<std::shared_ptr<model::Stage>> stages,
                   const ModelPlacement& placement, Groups groups, ExecutorOptions options,
                   ExchangeFactory exchange)
    : impl_(std::make_unique<Impl>(std::move(stages), placement, std::move(groups),
                                   std::move(options), std::move(exchange))) {}

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
                     .z_loss_weight = impl_->options().z_loss_coefficient /
                                      static_cast<double>(plan.total_tokens())},
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
                     .z_loss_weight = 0.0},
                    program);
}

}  // namespace meshloom::parallel
