#include "plan/balance/levels.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <queue>
#include <utility>

#include "meshloom/plan/step_time.h"
#include "plan/balance/fill.h"
#include "plan/internal/unit_times.h"

namespace meshloom::plan::balance {
namespace {

/// What sending the reference's traffic once more may cost, as a part of the step.
constexpr double kPriceOfTraffic = 0.06;
constexpr double kShareOfTokens = 0.5;
/// Numbers of slots that are tried, as multiples of what memory asks for.
constexpr double kSlotFactors[] = {1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0};
/// Bins that a short sample is offered to before a slot is added.
constexpr int kLevelOffers = 32;

struct Level {
  double time = 0.0;                      ///< what its units may take
  int room = 0;                           ///< ranks left
  std::vector<std::pair<int, int>> wide;  ///< (item, degree)
  std::vector<std::vector<int>> bins;     ///< items of units of one rank
};

/// Spreads a slot's units over the axis, inside nodes as far as they fit.
class Seats {
 public:
  explicit Seats(const Model& model) {
    const int nodes = (model.ranks + model.ranks_per_node - 1) / model.ranks_per_node;
    for (int node = 0; node < nodes; ++node) {
      const int begin = node * model.ranks_per_node;
      free_.emplace_back(begin, std::min(model.ranks, begin + model.ranks_per_node));
    }
  }

  std::vector<int> take(int degree) {
    std::vector<int> ranks;
    // The fullest node that has room for all, else the emptiest ones one after another.
    std::size_t best = free_.size();
    for (std::size_t n = 0; n < free_.size(); ++n) {
      if (left(n) >= degree && (best == free_.size() || left(n) < left(best))) best = n;
    }
    while (degree > 0) {
      if (best == free_.size()) {
        best = 0;
        for (std::size_t n = 1; n < free_.size(); ++n) {
          if (left(n) > left(best)) best = n;
        }
      }
      for (; degree > 0 && left(best) > 0; --degree) ranks.push_back(free_[best].first++);
      best = free_.size();
    }
    std::sort(ranks.begin(), ranks.end());
    return ranks;
  }

 private:
  [[nodiscard]] int left(std::size_t node) const { return free_[node].second - free_[node].first; }

  std::vector<std::pair<int, int>> free_;  // of each node
};

class Builder {
 public:
  Builder(const Model& model, double time) : model_(model), time_(time) {}

  std::vector<Level> build() {
    for (std::size_t i = 0; i < model_.items.size(); ++i) {
      const Item& item = model_.items[i];
      const bool alone = item.memory_degree > 1 || model_.time(item, 1) > time_;
      if (alone) {
        place_wide(static_cast<int>(i));
      } else {
        short_.push_back(static_cast<int>(i));
      }
    }
    open_for_short();
    for (const int item : short_) place_short(item);
    return std::move(levels_);
  }

 private:
  struct Bin {
    double left = 0.0;
    std::size_t level = 0;
    std::size_t index = 0;
    std::int64_t tokens = 0;
    bool operator<(const Bin& other) const {
      return left != other.left ? left < other.left
                                : std::pair(level, index) > std::pair(other.level, other.index);
    }
  };

  void place_wide(int index) {
    const Item& item = model_.items[static_cast<std::size_t>(index)];
    for (Level& level : levels_) {
      const int degree = model_.degree(item, level.time);
      if (degree > level.room || model_.time(item, degree) > level.time * (1.0 + 1e-9)) continue;
      level.wide.emplace_back(index, degree);
      level.room -= degree;
      return;
    }
    const int degree = model_.degree(item, time_);
    Level& level = add_level(std::max(time_, model_.time(item, degree)));
    level.wide.emplace_back(index, degree);
    level.room -= degree;
  }

  Level& add_level(double time) {
    levels_.push_back({.time = time, .room = model_.ranks, .wide = {}, .bins = {}});
    return levels_.back();
  }

  /// @param first  item that the first bin begins with; -1: none.
  void open_bins(std::size_t level, int first = -1) {
    Level& at = levels_[level];
    at.bins.resize(static_cast<std::size_t>(at.room));
    for (std::size_t b = 0; b < at.bins.size(); ++b) {
      const Bin bin{at.time - model_.cost.fixed, level, b, 0};
      if (b == 0 && first >= 0) {
        put(bin, first);
      } else {
        bins_.push(bin);
      }
    }
  }

  /// As many slots as the short samples need beside the wide ones.
  void open_for_short() {
    double work = 0.0;
    double tokens = 0.0;
    for (const int item : short_) {
      work += model_.items[static_cast<std::size_t>(item)].work;
      tokens += static_cast<double>(model_.items[static_cast<std::size_t>(item)].tokens);
    }
    for (const Level& level : levels_) {
      work -= level.room * std::max(0.0, level.time - model_.cost.fixed);
      tokens -= level.room * static_cast<double>(model_.capacity);
    }
    const double ranks = model_.ranks;
    const double by_time = work / (ranks * std::max(time_ - model_.cost.fixed, 1e-300));
    const double by_tokens = tokens / (ranks * static_cast<double>(model_.capacity));
    const double most = static_cast<double>(short_.size());
    const int more =
        static_cast<int>(std::clamp(std::ceil(std::max(by_time, by_tokens) - 1e-6), 0.0, most));
    for (int i = 0; i < more; ++i) add_level(time_);
    for (std::size_t level = 0; level < levels_.size(); ++level) open_bins(level);
  }

  void place_short(int index) {
    const Item& item = model_.items[static_cast<std::size_t>(index)];
    std::vector<Bin> full;
    bool placed = false;
    for (int offer = 0; offer < kLevelOffers && !bins_.empty() && !placed; ++offer) {
      Bin bin = bins_.top();
      bins_.pop();
      if (bin.tokens + item.tokens > model_.capacity) {
        full.push_back(bin);
        continue;
      }
      put(bin, index);
      placed = true;
    }
    for (const Bin& bin : full) bins_.push(bin);
    if (placed) return;
    add_level(time_);
    open_bins(levels_.size() - 1, index);
  }

  void put(Bin bin, int index) {
    const Item& item = model_.items[static_cast<std::size_t>(index)];
    levels_[bin.level].bins[bin.index].push_back(index);
    bin.left -= item.work;
    bin.tokens += item.tokens;
    bins_.push(bin);
  }

  const Model& model_;
  double time_;
  std::vector<Level> levels_;
  std::vector<int> short_;
  std::priority_queue<Bin> bins_;
};

/// Slots by falling time: neighbours differ least.
std::vector<Slot> to_slots_by_level(const PlanProblem& problem, const Model& model,
                                    std::vector<Level> levels) {
  std::stable_sort(levels.begin(), levels.end(),
                   [](const Level& a, const Level& b) { return a.time > b.time; });
  std::vector<Slot> slots;
  for (Level& level : levels) {
    std::stable_sort(level.wide.begin(), level.wide.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    Seats seats(model);
    std::vector<Piece> pieces;
    for (const auto& [item, degree] : level.wide) pieces.push_back({seats.take(degree), {item}});
    for (auto& bin : level.bins) {
      if (!bin.empty()) pieces.push_back({seats.take(1), std::move(bin)});
    }
    if (pieces.empty()) continue;
    // Disjoint ranks: they all land in one slot.
    auto made = to_slots(problem, model, pieces);
    slots.push_back(std::move(made.front()));
  }
  return slots;
}

/// Long slots cost a pipeline most where it fills, where it drains, or where their neighbours are
/// short: the slots by falling and by rising time, and with the longest or the shortest in the
/// middle.
std::vector<std::vector<Slot>> slot_orders(const StepPlan& plan) {
  const detail::TokensById tokens_of(plan.samples);
  std::vector<std::pair<double, std::size_t>> falling;
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    double time = 0.0;
    for (const auto& group : detail::together(plan, tokens_of, s)) {
      time = std::max(time, group.time);
    }
    falling.emplace_back(-time, s);
  }
  std::sort(falling.begin(), falling.end());
  const auto take = [&](const std::vector<std::size_t>& order) {
    std::vector<Slot> slots;
    for (const std::size_t s : order) slots.push_back(plan.slots[s]);
    return slots;
  };
  std::vector<std::size_t> down;
  std::deque<std::size_t> peak;
  for (const auto& [time, slot] : falling) {
    down.push_back(slot);
    if (peak.size() % 2 == 0) {
      peak.push_back(slot);
    } else {
      peak.push_front(slot);
    }
  }
  std::deque<std::size_t> valley;
  for (auto entry = falling.rbegin(); entry != falling.rend(); ++entry) {
    if (valley.size() % 2 == 0) {
      valley.push_back(entry->second);
    } else {
      valley.push_front(entry->second);
    }
  }
  return {take(down), take({down.rbegin(), down.rend()}), take({peak.begin(), peak.end()}),
          take({valley.begin(), valley.end()})};
}

}  // namespace

std::vector<Slot> level_slots(const PlanProblem& problem, const Model& model,
                              std::vector<Slot> first) {
  StepPlan trial;
  trial.layout = problem.layout;
  trial.lockstep = problem.lockstep;
  trial.cost = problem.cost;
  trial.samples = problem.samples;
  const double base =
      model.reference_exchange + kShareOfTokens * static_cast<double>(model.total_tokens);
  std::vector<Slot> best;
  double best_price = std::numeric_limits<double>::infinity();
  const auto consider = [&](std::vector<Slot> slots) {
    trial.slots = std::move(slots);
    predict_(trial);
    const double least = std::max(trial.predicted.lower_bound, 1e-300);
    const double price =
        *trial.predicted.step_time / least +
        kPriceOfTraffic * static_cast<double>(trial.predicted.exchange_tokens) / base;
    if (price >= best_price) return;
    best_price = price;
    best = std::move(trial.slots);
  };
  consider(std::move(first));
  const double ranks = model.ranks;
  const double by_memory = std::max(
      1.0, static_cast<double>(model.total_tokens) / (ranks * static_cast<double>(model.capacity)));
  const double most = static_cast<double>(model.items.size());
  double tried = 0.0;
  for (const double factor : kSlotFactors) {
    const double slots = std::min(std::ceil(factor * by_memory), most);
    if (slots == tried) continue;
    tried = slots;
    const double time = model.total_work / (ranks * slots) + model.cost.fixed;
    consider(to_slots_by_level(problem, model, Builder(model, time).build()));
  }
  if (problem.layout.pp == 1) return best;  // the order of level slots matters to pipelines alone
  trial.slots = best;
  for (auto& order : slot_orders(trial)) consider(std::move(order));
  return best;
}

}  // namespace meshloom::plan::balance
