#include "plan/internal/timetable.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "meshloom/core/error.h"

namespace meshloom::plan::detail {
namespace {

constexpr int kNotYet = -1;

class Timetable {
 public:
  Timetable(const Schedule& schedule, const Layout& layout, int slots)
      : schedule_(schedule),
        layout_(layout),
        slots_(slots),
        pieces_(layout.pp * layout.chunks),
        ends_(as_size(3 * pieces_ * slots), kNotYet),
        deferred_(as_size(pieces_ * slots), false) {}

  std::vector<OrderedAction> order() {
    run_tables();
    std::vector<std::pair<Key, OrderedAction>> keyed;
    for (int stage = 0; stage < layout_.pp; ++stage) {
      for (const auto& [key, event] : keyed_[as_size(stage)]) {
        if (event.peer_stage >= 0) continue;
        const StageAction action{event.op, event.chunk, event.slot, event.defer_weight_gradient};
        keyed.push_back({key, {stage, piece(stage, event.chunk), action}});
      }
    }
    std::sort(keyed.begin(), keyed.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<OrderedAction> result;
    result.reserve(keyed.size());
    for (const auto& entry : keyed) result.push_back(entry.second);
    return result;
  }

  std::vector<std::vector<StageEvent>> events() {
    run_tables();
    std::vector<std::vector<StageEvent>> events(as_size(layout_.pp));
    for (std::size_t stage = 0; stage < events.size(); ++stage) {
      auto& keyed = keyed_[stage];
      std::sort(keyed.begin(), keyed.end(),
                [](const Keyed& a, const Keyed& b) { return a.first < b.first; });
      for (const Keyed& entry : keyed) events[stage].push_back(entry.second);
    }
    return events;
  }

 private:
  void run_tables() {
    check_placement();
    check_tables();
    execute();
  }

  /// Time, transfers before what starts then, and a tie-break that both ends share.
  using Key = std::tuple<int, int, int, int, bool>;
  using Keyed = std::pair<Key, StageEvent>;

  static std::size_t as_size(int n) { return static_cast<std::size_t>(n); }
  [[noreturn]] static void refuse(const std::string& what) {
    throw PlanError("plan.schedule", what);
  }
  static std::string name(int stage, const StageAction& action) {
    return fmt::format("stage {}: {} of chunk {}, slot {}", stage, to_string(action.op),
                       action.chunk, action.slot);
  }

  /// Position in the model of what a stage holds as `chunk`.
  [[nodiscard]] int piece(int stage, int chunk) const {
    return piece_[as_size(stage * layout_.chunks + chunk)];
  }
  int& end_of(Op op, int piece, int slot) {
    const int row = op == Op::kForward ? 0 : op == Op::kBackward ? 1 : 2;
    return ends_[as_size((row * pieces_ + piece) * slots_ + slot)];
  }

  void check_placement() {
    if (schedule_.placement.size() != as_size(pieces_) ||
        schedule_.stages.size() != as_size(layout_.pp)) {
      refuse(fmt::format("{} stages and {} pieces of the model, the layout has {} and {}",
                         schedule_.stages.size(), schedule_.placement.size(), layout_.pp, pieces_));
    }
    piece_.assign(as_size(pieces_), kNotYet);
    for (int v = 0; v < pieces_; ++v) {
      const StageChunk& place = schedule_.placement[as_size(v)];
      if (place.stage < 0 || place.stage >= layout_.pp || place.chunk < 0 ||
          place.chunk >= layout_.chunks) {
        refuse(fmt::format("placement[{}] is stage {}, chunk {}; the layout has {} and {}", v,
                           place.stage, place.chunk, layout_.pp, layout_.chunks));
      }
      int& at = piece_[as_size(place.stage * layout_.chunks + place.chunk)];
      if (at != kNotYet) {
        refuse(fmt::format("placement[{}] and placement[{}] are both stage {}, chunk {}", at, v,
                           place.stage, place.chunk));
      }
      at = v;
    }
  }

  /// Every computation is there once, in an order that a stage alone can follow.
  void check_tables() {
    for (int stage = 0; stage < layout_.pp; ++stage) {
      std::vector<bool> done(as_size(3 * layout_.chunks * slots_), false);
      const auto mark = [&](Op op, const StageAction& action) {
        const int row = op == Op::kForward ? 0 : op == Op::kBackward ? 1 : 2;
        return as_size((row * layout_.chunks + action.chunk) * slots_ + action.slot);
      };
      for (const StageAction& action : schedule_.stages[as_size(stage)]) {
        if (action.chunk < 0 || action.chunk >= layout_.chunks || action.slot < 0 ||
            action.slot >= slots_) {
          refuse(fmt::format("{}: expected chunks 0 .. {} and slots 0 .. {}", name(stage, action),
                             layout_.chunks - 1, slots_ - 1));
        }
        const bool computes = action.op == Op::kForward || action.op == Op::kBackward ||
                              action.op == Op::kWeightGradient;
        if (!computes) refuse(name(stage, action) + ": tables list computations alone");
        if (done[mark(action.op, action)]) refuse(name(stage, action) + " is listed twice");
        done[mark(action.op, action)] = true;
        const auto slot = as_size(piece(stage, action.chunk) * slots_ + action.slot);
        if (action.op == Op::kBackward) {
          if (!done[mark(Op::kForward, action)]) {
            refuse(name(stage, action) + " comes before its forward");
          }
          deferred_[slot] = action.defer_weight_gradient;
        }
        if (action.op == Op::kWeightGradient) {
          if (!done[mark(Op::kBackward, action)]) {
            refuse(name(stage, action) + " comes before its backward");
          }
          if (!deferred_[slot]) refuse(name(stage, action) + ": its backward did not defer it");
        }
      }
      for (int chunk = 0; chunk < layout_.chunks; ++chunk) {
        for (int slot = 0; slot < slots_; ++slot) {
          const auto expect = [&](Op op) {
            const StageAction action{.op = op, .chunk = chunk, .slot = slot};
            if (!done[mark(op, action)]) refuse(name(stage, action) + " is missing");
          };
          expect(Op::kForward);
          expect(Op::kBackward);
          if (deferred_[as_size(piece(stage, chunk) * slots_ + slot)]) expect(Op::kWeightGradient);
        }
      }
    }
  }

  /// When what the action needs is there; kNotYet if some of it has not run.
  int ready(int stage, const StageAction& action) {
    const int v = piece(stage, action.chunk);
    if (action.op == Op::kForward) return v == 0 ? 0 : end_of(Op::kForward, v - 1, action.slot);
    if (action.op == Op::kWeightGradient) return end_of(Op::kBackward, v, action.slot);
    const int own = end_of(Op::kForward, v, action.slot);
    if (v == pieces_ - 1 || own == kNotYet) return own;
    const int next = end_of(Op::kBackward, v + 1, action.slot);
    return next == kNotYet ? kNotYet : std::max(own, next);
  }

  void execute() {
    keyed_.resize(as_size(layout_.pp));
    std::vector<std::size_t> at(as_size(layout_.pp), 0);
    std::vector<int> now(as_size(layout_.pp), 0);
    bool progress = true;
    while (progress) {
      progress = false;
      for (int stage = 0; stage < layout_.pp; ++stage) {
        const auto& order = schedule_.stages[as_size(stage)];
        while (at[as_size(stage)] < order.size()) {
          const StageAction& action = order[at[as_size(stage)]];
          const int from = ready(stage, action);
          if (from == kNotYet) break;
          const int start = std::max(from, now[as_size(stage)]);
          const bool whole = action.op == Op::kBackward && !action.defer_weight_gradient;
          now[as_size(stage)] = start + (whole ? 2 : 1);
          record(stage, action, start, now[as_size(stage)]);
          ++at[as_size(stage)];
          progress = true;
        }
      }
    }
    std::string waiting;
    for (int stage = 0; stage < layout_.pp; ++stage) {
      const auto& order = schedule_.stages[as_size(stage)];
      if (at[as_size(stage)] == order.size()) continue;
      waiting += (waiting.empty() ? "" : "; ") + name(stage, order[at[as_size(stage)]]);
    }
    if (!waiting.empty()) refuse("the stages wait for each other: " + waiting);
  }

  void record(int stage, const StageAction& action, int start, int end) {
    const int v = piece(stage, action.chunk);
    end_of(action.op, v, action.slot) = end;
    keyed_[as_size(stage)].push_back({{start, 1, v, action.slot, false},
                                      {.op = action.op,
                                       .chunk = action.chunk,
                                       .slot = action.slot,
                                       .defer_weight_gradient = action.defer_weight_gradient}});
    if (action.op == Op::kWeightGradient) return;
    const bool gradient = action.op == Op::kBackward;
    const int other = gradient ? v - 1 : v + 1;
    if (other < 0 || other == pieces_) return;
    const StageChunk& to = schedule_.placement[as_size(other)];
    if (to.stage == stage) return;
    const Key key{end, 0, v, action.slot, gradient};
    keyed_[as_size(stage)].push_back({key,
                                      {.op = Op::kSend,
                                       .chunk = action.chunk,
                                       .slot = action.slot,
                                       .peer_stage = to.stage,
                                       .gradient = gradient}});
    keyed_[as_size(to.stage)].push_back({key,
                                         {.op = Op::kReceive,
                                          .chunk = to.chunk,
                                          .slot = action.slot,
                                          .peer_stage = stage,
                                          .gradient = gradient}});
  }

  const Schedule& schedule_;
  const Layout& layout_;
  int slots_;
  int pieces_;
  std::vector<int> piece_;                 // [stage, chunk] -> position in the model
  std::vector<int> ends_;                  // [op, piece, slot]
  std::vector<bool> deferred_;             // [piece, slot]
  std::vector<std::vector<Keyed>> keyed_;  // [stage]
};

}  // namespace

std::vector<std::vector<StageEvent>> timetable(const Schedule& schedule, const Layout& layout,
                                               int slots) {
  return Timetable(schedule, layout, slots).events();
}

std::vector<OrderedAction> global_order(const Schedule& schedule, const Layout& layout, int slots) {
  return Timetable(schedule, layout, slots).order();
}

}  // namespace meshloom::plan::detail
