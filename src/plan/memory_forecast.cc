#include "meshloom/plan/memory_forecast.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/schedule.h"
#include "meshloom/plan/slicing.h"
#include "plan/internal/memory_layers.h"
#include "plan/internal/memory_states.h"

namespace meshloom::plan {
namespace {

using detail::Held;
using detail::LayerMemory;
using detail::MemoryFlow;
using detail::MemoryLedger;
using detail::StateMemory;

constexpr const char* kForecastWhere = "plan.memory_forecast";
constexpr std::array<std::string_view, kMemoryParts> kPartNames{
    "parameters", "gradients",    "masters",   "optimizer", "zero",     "stream",
    "attention",  "feed_forward", "workspace", "logits",    "exchange", "communication"};
constexpr std::int64_t kIndexBytes = 8;

/// One rank's program on sizes: src/parallel/executor.cc.
class Walker {
 public:
  Walker(const MemorySetting& setting, const StepPlan& plan, const Program& program)
      : setting_(setting),
        plan_(plan),
        program_(program),
        at_(plan.layout.coordinates(program.rank)),
        states_(setting, program.rank, ledger_),
        layers_(setting, at_.tp, ledger_) {
    for (const SampleInfo& sample : plan.samples) tokens_[sample.id] = sample.tokens;
    place_chunks();
    for (const Instruction& instruction : program.instructions) {
      const bool leaves = instruction.op == Op::kWeightGradient ||
                          (instruction.op == Op::kBackward && !instruction.defer_weight_gradient);
      if (leaves) last_gradients_[instruction.chunk] = &instruction;
    }
  }

  MemoryForecast walk() {
    for (const Instruction& instruction : program_.instructions) run(instruction);
    return {.rank = program_.rank, .bytes = ledger_.most()};
  }

 private:
  /// One chunk's place in the model.
  struct Place {
    int piece = 0;
    std::int64_t first = 0;
    std::int64_t last = 0;
    bool with_embedding = false;
    bool with_head = false;
  };
  struct Work {
    MemoryFlow flow;
    Held tables;
    std::vector<std::pair<std::int64_t, std::vector<Held>>> deferred;  // by layer
  };
  struct Slot {
    Held batch;
    int open_chunks = 0;
  };

  void place_chunks() {
    const auto placement = make_schedule(setting_.schedule, plan_.layout, 0).placement;
    const auto pieces = static_cast<int>(placement.size());
    const std::vector<int> split =
        setting_.split.empty() ? even_split(static_cast<int>(setting_.model.layers()), pieces)
                               : setting_.split;
    places_.resize(static_cast<std::size_t>(plan_.layout.chunks));
    std::int64_t first = 0;
    for (int piece = 0; piece < pieces; ++piece) {
      const auto index = static_cast<std::size_t>(piece);
      const std::int64_t last = first + split[index];
      if (placement[index].stage == at_.pp) {
        places_.at(static_cast<std::size_t>(placement[index].chunk)) = {
            piece, first, last, piece == 0, piece + 1 == pieces};
      }
      first = last;
    }
  }

  [[nodiscard]] const Place& place(const Instruction& instruction) const {
    return places_[static_cast<std::size_t>(instruction.chunk)];
  }

  [[nodiscard]] MemoryFlow flow_of(const Instruction& instruction) const {
    MemoryFlow flow;
    if (instruction.unit < 0) return flow;
    const Unit& unit = plan_.slots.at(static_cast<std::size_t>(instruction.slot))
                           .units.at(static_cast<std::size_t>(instruction.unit));
    flow.degree = static_cast<int>(unit.ranks.size());
    flow.exchange = unit.exchange;
    const auto found = std::find(unit.ranks.begin(), unit.ranks.end(), at_.hdp);
    MESHLOOM_CHECK(found != unit.ranks.end(), kForecastWhere,
                   "the program runs a unit without its rank");
    const auto member = static_cast<int>(found - unit.ranks.begin());
    for (const std::int64_t id : unit.samples) {
      for (const TokenRange& range : member_ranges(tokens_.at(id), flow.degree, member)) {
        flow.all += range.size();
      }
    }
    const int tp = plan_.layout.tp;
    flow.own = flow.all * (at_.tp + 1) / tp - flow.all * at_.tp / tp;
    return flow;
  }

  void run(const Instruction& instruction) {
    switch (instruction.op) {
      case Op::kLoad: {
        // Tokens, positions, labels.
        const std::int64_t all = flow_of(instruction).all;
        slots_[instruction.slot] = {ledger_.hold(MemoryPart::kStream, 3 * all * kIndexBytes),
                                    plan_.layout.chunks};
        return;
      }
      case Op::kForward:
        return forward(instruction);
      case Op::kBackward:
        return backward(instruction);
      case Op::kWeightGradient:
        return weight_gradient(instruction);
      case Op::kSend:
        // What has left is let go when the next message leaves.
        sent_ = take(leaving_, instruction.slot, instruction.chunk, instruction.gradient);
        return;
      case Op::kReceive:
        arriving_[{instruction.slot, instruction.chunk, instruction.gradient}] =
            layers_.stream_rows(flow_of(instruction), MemoryPart::kCommunication);
        return;
      case Op::kReduce:
        return states_.reduce_all();
      case Op::kStep:
        return states_.gather();
    }
  }

  using Passages = std::map<std::tuple<int, int, bool>, Held>;
  static Held take(Passages& passages, int slot, int chunk, bool gradient) {
    auto found = passages.extract({slot, chunk, gradient});
    return found.empty() ? Held() : std::move(found.mapped());
  }
  /// The chunk of this rank that holds the piece `step` further on, or -1.
  [[nodiscard]] int neighbour(const Place& from, int step) const {
    for (std::size_t c = 0; c < places_.size(); ++c) {
      if (places_[c].piece == from.piece + step) return static_cast<int>(c);
    }
    return -1;
  }
  Held input(const Instruction& instruction, bool gradient) {
    const int other = neighbour(place(instruction), gradient ? 1 : -1);
    Held held = other >= 0 ? take(leaving_, instruction.slot, other, gradient)
                           : take(arriving_, instruction.slot, instruction.chunk, gradient);
    if (!held) held = layers_.stream_rows(flow_of(instruction), MemoryPart::kCommunication);
    return held;
  }

  void forward(const Instruction& instruction) {
    const Place& at = place(instruction);
    Work& work = works_[{instruction.slot, instruction.chunk}];
    work.flow = flow_of(instruction);
    LayerMemory::Stream h;
    if (at.with_embedding) {
      states_.enter(at.piece, -1, at.first);
      h.stream = layers_.embedding(work.flow);
    } else {
      h.stream = input(instruction, false);
    }
    work.tables = layers_.tables(work.flow);
    for (std::int64_t layer = at.first; layer < at.last; ++layer) {
      states_.enter(at.piece, layer, layer + 1);
      layers_.forward(work.flow, layer, h);
    }
    if (at.with_head) {
      const std::int64_t head = setting_.model.layers();
      states_.enter(at.piece, head, head);
      layers_.head(work.flow, h, [&] {
        states_.touch(at.piece, setting_.model.tied_embeddings ? -1 : head);
        states_.touch(at.piece, head);
      });
    } else {
      leaving_[{instruction.slot, instruction.chunk, false}] =
          h.pending ? std::move(h.pending) : std::move(h.stream);
    }
    states_.end_pass(at.piece);
  }

  void backward(const Instruction& instruction) {
    const Place& at = place(instruction);
    Work& work = works_.at({instruction.slot, instruction.chunk});
    const bool defers = instruction.defer_weight_gradient;
    work.flow.defers = defers;
    const bool last = is_last(instruction);
    const std::int64_t head = setting_.model.layers();
    Held received;
    Held dh;
    if (at.with_head) {
      dh = layers_.head_backward(work.flow);
      finish(work, at, head, defers, last);
    } else {
      received = input(instruction, true);
      dh = layers_.stream_rows(work.flow, MemoryPart::kWorkspace);
    }
    for (std::int64_t layer = at.last - 1; layer >= at.first; --layer) {
      states_.enter(at.piece, layer, layer - 1 >= 0 ? layer - 1 : layer);
      if (!defers) states_.touch(at.piece, layer);
      layers_.backward(work.flow, layer, dh);
      finish(work, at, layer, defers, last);
    }
    if (at.with_embedding) {
      layers_.embedding_backward(work.flow);
      if (!defers) states_.touch(at.piece, -1);
      if (defers) work.flow.deferred.push_back(dh);
      finish(work, at, -1, defers, last);
      dh.reset();
    } else {
      leaving_[{instruction.slot, instruction.chunk, true}] = std::move(dh);
    }
    states_.end_pass(at.piece);
    if (!defers) close(instruction);
  }

  void finish(Work& work, const Place& at, std::int64_t layer, bool defers, bool last) {
    if (defers) {
      work.deferred.emplace_back(layer, std::exchange(work.flow.deferred, {}));
    } else {
      states_.done(at.piece, layer, last);
    }
  }

  void weight_gradient(const Instruction& instruction) {
    const Place& at = place(instruction);
    Work& work = works_.at({instruction.slot, instruction.chunk});
    for (auto& [layer, kept] : work.deferred) {
      states_.touch(at.piece, layer);
      kept.clear();
      states_.done(at.piece, layer, is_last(instruction));
    }
    states_.end_pass(at.piece);
    close(instruction);
  }

  [[nodiscard]] bool is_last(const Instruction& instruction) const {
    const auto found = last_gradients_.find(instruction.chunk);
    return found != last_gradients_.end() && found->second == &instruction;
  }

  void close(const Instruction& instruction) {
    works_.erase({instruction.slot, instruction.chunk});
    const auto slot = slots_.find(instruction.slot);
    if (slot != slots_.end() && --slot->second.open_chunks == 0) slots_.erase(slot);
  }

  const MemorySetting& setting_;
  const StepPlan& plan_;
  const Program& program_;
  Coordinates at_;
  MemoryLedger ledger_;  // outlives all that it counts
  StateMemory states_;
  LayerMemory layers_;
  std::unordered_map<std::int64_t, std::int64_t> tokens_;
  std::vector<Place> places_;  // [chunk]
  std::map<int, const Instruction*> last_gradients_;
  std::map<int, Slot> slots_;
  std::map<std::pair<int, int>, Work> works_;  // (slot, chunk)
  Passages arriving_;
  Passages leaving_;
  Held sent_;
};

}  // namespace

std::string_view to_string(MemoryPart part) {
  return kPartNames.at(static_cast<std::size_t>(part));
}

void MemorySetting::validate() const {
  model.validate();
  layout.validate();
  const auto check = [](bool holds, const char* field, const std::string& given,
                        const char* expected) {
    MESHLOOM_CHECK(holds, kForecastWhere,
                   fmt::format("{} is {}, expected {}", field, given, expected));
  };
  check(1 <= zero && zero <= 3, "zero", std::to_string(zero), "1, 2 or 3");
  check(recompute == "none" || recompute == "selective" || recompute == "full", "recompute",
        recompute, "none, selective or full");
  check(element_bytes == 2 || element_bytes == 4 || element_bytes == 8, "element_bytes",
        std::to_string(element_bytes), "2, 4 or 8");
  const auto pieces = std::ssize(make_schedule(schedule, layout, 0).placement);
  check(split.empty() ? pieces <= model.layers() : std::ssize(split) == pieces, "split",
        fmt::format("[{}]", fmt::join(split, ", ")),
        "one number of layers for each of pp x chunks pieces, or none for an even one");
  check(split.empty() ||
            std::accumulate(split.begin(), split.end(), std::int64_t{0}) == model.layers(),
        "split", fmt::format("[{}]", fmt::join(split, ", ")), "numbers that add up to the layers");
}

std::int64_t MemoryForecast::total() const {
  return std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0});
}

std::int64_t MemoryForecast::states() const {
  return of(MemoryPart::kParameters) + of(MemoryPart::kGradients) + of(MemoryPart::kMasters) +
         of(MemoryPart::kOptimizer);
}

MemoryForecast forecast_memory(const MemorySetting& setting, const StepPlan& plan,
                               const Program& program) {
  setting.validate();
  MESHLOOM_CHECK(plan.layout == setting.layout, kForecastWhere,
                 fmt::format("the plan is for layout {}, the setting for {}",
                             plan.layout.to_string(), setting.layout.to_string()));
  MESHLOOM_CHECK(0 <= program.rank && program.rank < plan.layout.world_size(), kForecastWhere,
                 fmt::format("the program is of rank {}, the layout has {} ranks", program.rank,
                             plan.layout.world_size()));
  return Walker(setting, plan, program).walk();
}

StepPlan fullest_step(const MemorySetting& setting, const StepLimits& limits) {
  setting.validate();
  MESHLOOM_CHECK_GE(limits.capacity, 1, kForecastWhere, "capacity");
  MESHLOOM_CHECK_GE(limits.global_batch, 1, kForecastWhere, "global_batch");
  const Layout& layout = setting.layout;
  StepPlan plan;
  plan.layout = layout;
  plan.capacity_tokens = limits.capacity;
  plan.lockstep = setting.zero > 1 ? Lockstep::kHdp
                  : layout.ep > 1  ? Lockstep::kEp
                                   : Lockstep::kNone;
  const std::int64_t longest =
      std::clamp<std::int64_t>(limits.longest_document, 1, limits.capacity * layout.hdp);
  const auto degree = static_cast<int>((longest + limits.capacity - 1) / limits.capacity);
  const std::int64_t tokens = std::min(limits.capacity, limits.global_batch);
  // No schedule holds more than this many micro-batches at once.
  const std::int64_t deepest = std::int64_t{2} * layout.pp;
  const std::int64_t slots = std::clamp<std::int64_t>(
      (limits.global_batch + tokens * layout.hdp - 1) / (tokens * layout.hdp), 1, deepest);
  for (std::int64_t s = 0; s < slots; ++s) {
    Slot& slot = plan.slots.emplace_back();
    for (int rank = 0; rank < layout.hdp;) {
      const int members = rank + degree <= layout.hdp ? degree : 1;
      Unit unit;
      for (int i = 0; i < members; ++i) unit.ranks.push_back(rank++);
      unit.exchange = members > 1 ? Exchange::kRing : Exchange::kLocal;
      unit.samples = {std::ssize(plan.samples)};
      plan.samples.push_back({.id = unit.samples.front(),
                              .tokens = tokens * members,
                              .loss_tokens = tokens * members - 1});
      slot.units.push_back(std::move(unit));
    }
  }
  return plan;
}

std::vector<MemoryForecast> forecast_memory(const MemorySetting& setting,
                                            const StepLimits& limits) {
  const StepPlan plan = fullest_step(setting, limits);
  const CompileOptions options{.layers = static_cast<int>(setting.model.layers()),
                               .schedule = setting.schedule,
                               .table = nullptr,
                               .split = setting.split};
  std::vector<MemoryForecast> result;
  for (int stage = 0; stage < setting.layout.pp; ++stage) {
    const int rank = setting.layout.rank({.tp = 0, .hdp = 0, .pp = stage});
    result.push_back(Walker(setting, plan, compile_rank(plan, options, rank)).walk());
  }
  return result;
}

}  // namespace meshloom::plan
