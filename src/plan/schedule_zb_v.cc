#include <algorithm>
#include <deque>
#include <functional>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

#include "plan/internal/schedules.h"

namespace meshloom::plan::detail {
namespace {

/// Runs a V-shaped pipeline with unit times (forward, input gradient and weight gradient 1 each)
/// and writes down what each stage did: a list schedule that prefers backwards, then forwards under
/// an in-flight limit, then weight gradients. An order that was observed in an execution can't
/// deadlock.
class Generator {
 public:
  Generator(int stages, int slots) : stages_(stages), slots_(slots), state_(as_size(stages)) {
    schedule_.stages.resize(as_size(stages));
    for (int piece = 0; piece < 2 * stages; ++piece) {
      schedule_.placement.push_back(piece < stages ? StageChunk{piece, 0}
                                                   : StageChunk{2 * stages - 1 - piece, 1});
    }
    // Twice the stages of half the size: what 1F1B holds on its first stage, on every stage.
    for (auto& state : state_) state.limit = 2 * stages;
  }

  Schedule run() {
    for (int slot = 0; slot < slots_; ++slot) forward_ready(0, slot);
    int left = 3 * 2 * stages_ * slots_;
    int now = 0;
    while (left > 0) {
      bool started = false;
      for (int stage = 0; stage < stages_; ++stage) {
        if (state_[as_size(stage)].busy) continue;
        if (start(stage, now)) {
          started = true;
          --left;
        }
      }
      if (events_.empty() && !started) {
        relax();
        continue;
      }
      now = std::get<0>(events_.top());
      while (!events_.empty() && std::get<0>(events_.top()) == now) {
        const auto [time, stage, op, piece, slot] = events_.top();
        events_.pop();
        finish(stage, op, piece, slot);
      }
    }
    return std::move(schedule_);
  }

 private:
  using Key = std::tuple<int, int, int>;             // preference, piece, slot
  using Event = std::tuple<int, int, Op, int, int>;  // time, stage, op, piece, slot
  struct StageState {
    bool busy = false;
    int in_flight = 0;  // pieces whose forward began and whose weight gradient has not ended
    int limit = 0;
    std::set<Key> forwards;
    std::set<Key> backwards;
    std::deque<std::pair<int, int>> weights;  // piece, slot
  };

  static std::size_t as_size(int n) { return static_cast<std::size_t>(n); }
  [[nodiscard]] int last_piece() const { return 2 * stages_ - 1; }
  [[nodiscard]] const StageChunk& place(int piece) const {
    return schedule_.placement[as_size(piece)];
  }
  StageState& state_of(int piece) { return state_[as_size(place(piece).stage)]; }

  /// The later chunk goes first: it is nearer to the gradient that frees memory.
  void forward_ready(int piece, int slot) {
    state_of(piece).forwards.insert({-place(piece).chunk * slots_ + slot, piece, slot});
  }
  void backward_ready(int piece, int slot) {
    state_of(piece).backwards.insert({2 * slot - place(piece).chunk, piece, slot});
  }

  bool start(int stage, int now) {
    auto& state = state_[as_size(stage)];
    if (!state.backwards.empty()) {
      take(stage, Op::kBackward, state.backwards, now);
    } else if (!state.forwards.empty() && state.in_flight < state.limit) {
      ++state.in_flight;
      take(stage, Op::kForward, state.forwards, now);
    } else if (!state.weights.empty()) {
      const auto [piece, slot] = state.weights.front();
      state.weights.pop_front();
      begin(stage, Op::kWeightGradient, piece, slot, now);
    } else {
      return false;
    }
    return true;
  }

  void take(int stage, Op op, std::set<Key>& ready, int now) {
    const auto [preference, piece, slot] = *ready.begin();
    ready.erase(ready.begin());
    begin(stage, op, piece, slot, now);
  }

  void begin(int stage, Op op, int piece, int slot, int now) {
    state_[as_size(stage)].busy = true;
    schedule_.stages[as_size(stage)].push_back({.op = op,
                                                .chunk = place(piece).chunk,
                                                .slot = slot,
                                                .defer_weight_gradient = op == Op::kBackward});
    events_.emplace(now + 1, stage, op, piece, slot);
  }

  void finish(int stage, Op op, int piece, int slot) {
    auto& state = state_[as_size(stage)];
    state.busy = false;
    if (op == Op::kForward) {
      if (piece == last_piece()) {
        backward_ready(piece, slot);
      } else {
        forward_ready(piece + 1, slot);
      }
    } else if (op == Op::kBackward) {
      if (piece > 0) backward_ready(piece - 1, slot);
      state.weights.emplace_back(piece, slot);
    } else {
      --state.in_flight;
    }
  }

  /// All stages wait although work is left: a limit keeps back the forward that the rest needs. The
  /// piece nearest to the end gets room.
  void relax() {
    StageState* chosen = nullptr;
    int nearest = -1;
    for (auto& state : state_) {
      if (state.forwards.empty()) continue;
      const int piece = std::get<1>(*state.forwards.begin());
      if (piece > nearest) {
        nearest = piece;
        chosen = &state;
      }
    }
    ++chosen->limit;
  }

  int stages_;
  int slots_;
  std::vector<StageState> state_;
  Schedule schedule_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
};

}  // namespace

Schedule zero_bubble_v(int stages, int slots) { return Generator(stages, slots).run(); }

}  // namespace meshloom::plan::detail
