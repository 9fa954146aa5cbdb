#include "meshloom/plan/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/core/error.h"
#include "plan/internal/schedules.h"
#include "plan/internal/timetable.h"

namespace meshloom::plan {
namespace {

/// One forward, one backward: `warmup` forwards ahead, then both in turn, then the backwards that
/// are left. Weight gradients run `weight_delay` backwards late; negative: inside the backward.
struct Alternation {
  int total = 0;  ///< forwards, and backwards
  int warmup = 0;
  int weight_delay = -1;
  std::function<StageAction(int)> forward;   ///< k-th forward of the stage: chunk and slot
  std::function<StageAction(int)> backward;  ///< k-th backward
};

std::vector<StageAction> unroll(const Alternation& rule) {
  std::vector<StageAction> order;
  const auto add = [&](StageAction action, Op op) {
    action.op = op;
    action.defer_weight_gradient = op == Op::kBackward && rule.weight_delay >= 0;
    order.push_back(action);
  };
  const int warmup = std::min(rule.warmup, rule.total);
  for (int k = 0; k < warmup; ++k) add(rule.forward(k), Op::kForward);
  int weights = 0;
  for (int k = 0; k < rule.total; ++k) {
    if (warmup + k < rule.total) add(rule.forward(warmup + k), Op::kForward);
    add(rule.backward(k), Op::kBackward);
    if (rule.weight_delay >= 0 && k >= rule.weight_delay) {
      add(rule.backward(weights++), Op::kWeightGradient);
    }
  }
  if (rule.weight_delay >= 0) {
    while (weights < rule.total) add(rule.backward(weights++), Op::kWeightGradient);
  }
  return order;
}

/// Interleaved [Narayanan et al. 2021]: groups of p slots run chunk after chunk. Made for a
/// multiple of p slots; those that are not there are left out, which keeps the order valid.
std::vector<StageAction> interleaved(int stages, int chunks, int stage, int slots) {
  const int round = stages * chunks;
  const int padded = (slots + stages - 1) / stages * stages;
  const auto forward = [=](int k) {
    return StageAction{.chunk = k % round / stages, .slot = k / round * stages + k % stages};
  };
  const auto backward = [=](int k) {
    return StageAction{.chunk = chunks - 1 - k % round / stages,
                       .slot = k / round * stages + k % stages};
  };
  auto order = unroll({.total = padded * chunks,
                       .warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages,
                       .weight_delay = -1,
                       .forward = forward,
                       .backward = backward});
  std::erase_if(order, [slots](const StageAction& action) { return action.slot >= slots; });
  return order;
}

/// 1F1B, and ZB-H1 as the same with weight gradients `stage` backwards late [Qi et al. 2023].
std::vector<StageAction> one_chunk(int stages, int stage, int slots, bool split_backward) {
  const auto slot = [](int k) { return StageAction{.chunk = 0, .slot = k}; };
  return unroll({.total = slots,
                 .warmup = stages - stage - 1,
                 .weight_delay = split_backward ? stage : -1,
                 .forward = slot,
                 .backward = slot});
}

Schedule staged(const Layout& layout,
                const std::function<std::vector<StageAction>(int stage)>& order_of) {
  Schedule schedule;
  for (int piece = 0; piece < layout.pp * layout.chunks; ++piece) {
    schedule.placement.push_back({piece % layout.pp, piece / layout.pp});
  }
  for (int stage = 0; stage < layout.pp; ++stage) schedule.stages.push_back(order_of(stage));
  return schedule;
}

struct Kind {
  std::string_view name;
  int chunks;  ///< a stage; 0: any number
  Schedule (*make)(const Layout& layout, int slots);
};

constexpr std::array<Kind, 4> kKinds{{
    {"1f1b", 1,
     [](const Layout& layout, int slots) {
       return staged(layout, [&](int stage) { return one_chunk(layout.pp, stage, slots, false); });
     }},
    {"interleaved_1f1b", 0,
     [](const Layout& layout, int slots) {
       return staged(
           layout, [&](int stage) { return interleaved(layout.pp, layout.chunks, stage, slots); });
     }},
    {"zb_h1", 1,
     [](const Layout& layout, int slots) {
       return staged(layout, [&](int stage) { return one_chunk(layout.pp, stage, slots, true); });
     }},
    {"zb_v", 2,
     [](const Layout& layout, int slots) { return detail::zero_bubble_v(layout.pp, slots); }},
}};

/// Without a pipeline every slot runs through all chunks, then back.
Schedule sequential(const Layout& layout, int slots) {
  Schedule schedule;
  schedule.stages.resize(1);
  auto& order = schedule.stages.front();
  for (int chunk = 0; chunk < layout.chunks; ++chunk) schedule.placement.push_back({0, chunk});
  for (int slot = 0; slot < slots; ++slot) {
    for (int chunk = 0; chunk < layout.chunks; ++chunk) {
      order.push_back({.op = Op::kForward, .chunk = chunk, .slot = slot});
    }
    for (int chunk = layout.chunks - 1; chunk >= 0; --chunk) {
      order.push_back({.op = Op::kBackward, .chunk = chunk, .slot = slot});
    }
  }
  return schedule;
}

}  // namespace

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const auto& kind : kKinds) names.emplace_back(kind.name);
  return names;
}

Schedule make_schedule(const std::string& given, const Layout& layout, int slots) {
  const std::string name = !given.empty() ? given : layout.chunks > 1 ? "interleaved_1f1b" : "1f1b";
  const auto kind =
      std::find_if(kKinds.begin(), kKinds.end(), [&](const Kind& k) { return k.name == name; });
  if (kind == kKinds.end()) {
    throw NotSupported("plan.schedule", fmt::format("pipeline schedule \"{}\"; known: {}", name,
                                                    fmt::join(schedule_names(), ", ")));
  }
  if (layout.pp == 1) return sequential(layout, slots);
  if (kind->chunks != 0 && kind->chunks != layout.chunks) {
    throw InvalidArgument("plan.schedule",
                          fmt::format("\"{}\" takes {} model chunks a stage, the layout has {}",
                                      name, kind->chunks, layout.chunks));
  }
  return kind->make(layout, slots);
}

std::vector<int> even_split(int layers, int pieces) {
  std::vector<int> split;
  for (std::int64_t v = 0; v < pieces; ++v) {
    split.push_back(static_cast<int>((v + 1) * layers / pieces - v * layers / pieces));
  }
  return split;
}

std::vector<int> level_split(std::span<const double> layers, double first, double last,
                             int pieces) {
  const auto count = static_cast<int>(layers.size());
  MESHLOOM_CHECK(
      1 <= pieces && pieces <= count, "plan.level_split",
      fmt::format("{} pieces of {} layers, expected 1 to as many pieces as layers", pieces, count));
  std::vector<double> before{0.0};  // work of the layers before each
  for (const double work : layers) before.push_back(before.back() + work);
  const auto at = [](int i) { return static_cast<std::size_t>(i); };
  const auto work_of = [&](int piece, int begin, int end) {
    return before[at(end)] - before[at(begin)] + (piece == 0 ? first : 0.0) +
           (piece + 1 == pieces ? last : 0.0);
  };
  // best[v][end]: least `combine` over pieces 0 .. v that end before layer `end`.
  std::vector<std::vector<int>> cut;
  const auto solve = [&](const auto& combine) {
    constexpr double kNever = std::numeric_limits<double>::infinity();
    std::vector<double> best(layers.size() + 1, kNever);
    best[0] = 0.0;
    cut.assign(at(pieces), std::vector<int>(layers.size() + 1, 0));
    for (int v = 0; v < pieces; ++v) {
      std::vector<double> next(layers.size() + 1, kNever);
      for (int end = v + 1; end <= count; ++end) {
        for (int begin = v; begin < end; ++begin) {
          const double value = combine(best[at(begin)], work_of(v, begin, end));
          if (value < next[at(end)]) {
            next[at(end)] = value;
            cut[at(v)][at(end)] = begin;
          }
        }
      }
      best = std::move(next);
    }
    return best.back();
  };
  const double heaviest =
      solve([](double sum, double work) { return std::max(sum, work); }) * (1.0 + 1e-12);
  static_cast<void>(solve([&](double sum, double work) {
    return work > heaviest ? std::numeric_limits<double>::infinity() : sum + work * work;
  }));
  std::vector<int> split(at(pieces));
  for (int v = pieces - 1, end = count; v >= 0; --v) {
    split[at(v)] = end - cut[at(v)][at(end)];
    end = cut[at(v)][at(end)];
  }
  return split;
}

void check_schedule(const Schedule& schedule, const Layout& layout, int slots) {
  (void)detail::timetable(schedule, layout, slots);
}

}  // namespace meshloom::plan
