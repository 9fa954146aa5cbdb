#include "meshloom/plan/exact.h"

#include <algorithm>
#include <array>
#include <utility>

#include "meshloom/plan/bounds.h"
#include "plan/balance/fill.h"
#include "plan/balance/model.h"
#include "plan/balance/search.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

/// A plan must be better by this part to count as better: rounding is no progress.
constexpr double kProgress = 1e-9;

/// Why choosing (sample, degree) is enough: take units in the order of their start times. When one
/// starts at t, every rank that is free by then is as good as any other, since what follows starts
/// at t or later. So the ranks are those free first, and t is the time when the last of them is, or
/// the latest start so far.
class Exact {
 public:
  Exact(const balance::Model& model, balance::Schedule first, double bound, std::int64_t limit)
      : model_(model), best_(std::move(first)), bound_(bound), limit_(limit) {
    free_.assign(static_cast<std::size_t>(model.ranks), 0.0);
    used_.assign(model.items.size(), 0);
  }

  void run() {
    left_ = model_.items.size();
    descend_(0.0, 0);
  }
  [[nodiscard]] const balance::Schedule& best() const { return best_; }
  [[nodiscard]] bool complete() const { return visited_ <= limit_; }
  [[nodiscard]] std::int64_t visited() const { return visited_; }

 private:
  [[nodiscard]] double goal() const { return best_.makespan * (1.0 - kProgress); }

  [[nodiscard]] double bound_from(double last_start) const {
    double area = 0.0;
    for (const double at : free_) area += std::max(at, last_start);
    double slowest = 0.0;
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if (used_[i]) continue;
      const balance::Item& item = model_.items[i];
      const int degree = model_.degree(item, goal() - last_start);
      area += item.work + model_.cost.exchange * (degree - 1) * static_cast<double>(item.tokens);
      slowest = std::max(slowest, std::min(model_.time(item, item.memory_degree),
                                           model_.time(item, model_.ranks)));
    }
    return std::max(area / model_.ranks, last_start + slowest);
  }

  void finish_() {
    const double makespan = *std::max_element(free_.begin(), free_.end());
    if (makespan >= goal()) return;
    best_.makespan = makespan;
    best_.pieces = pieces_;
  }

  void descend_(double last_start, std::size_t last_item) {
    if (++visited_ > limit_ || best_.makespan <= bound_ * (1.0 + kProgress)) return;
    if (left_ == 0) return finish_();
    if (bound_from(last_start) >= goal()) return;
    if (model_.cost.fixed > 0.0 && !pieces_.empty()) extend_(last_start, last_item);
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if (used_[i] || same_as_earlier(i)) continue;
      for (int degree = model_.items[i].memory_degree; degree <= model_.most_ranks(model_.items[i]);
           ++degree) {
        open_(i, degree, last_start, last_item);
      }
    }
  }

  /// Equal samples are taken in order.
  [[nodiscard]] bool same_as_earlier(std::size_t i) const {
    return i > 0 && !used_[i - 1] && model_.items[i - 1].tokens == model_.items[i].tokens;
  }

  void open_(std::size_t i, int degree, double last_start, std::size_t last_item) {
    std::vector<int> order(free_.size());
    for (std::size_t r = 0; r < order.size(); ++r) order[r] = static_cast<int>(r);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return free_[static_cast<std::size_t>(a)] < free_[static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(degree));
    const double start = std::max(last_start, free_[static_cast<std::size_t>(order.back())]);
    // Units that start together are taken by sample.
    if (!pieces_.empty() && start == last_start && i < last_item) return;
    const double end = start + model_.time(model_.items[i], degree);
    if (end >= goal()) return;
    std::sort(order.begin(), order.end());
    const std::vector<double> before = free_;
    for (const int rank : order) free_[static_cast<std::size_t>(rank)] = end;
    pieces_.push_back({order, {static_cast<int>(i)}});
    used_[i] = 1;
    --left_;
    const std::int64_t tokens = std::exchange(tokens_, model_.items[i].tokens);
    descend_(start, i);
    tokens_ = tokens;
    ++left_;
    used_[i] = 0;
    pieces_.pop_back();
    free_ = before;
  }

  /// More samples in the unit that was opened last, which saves a fixed cost.
  void extend_(double last_start, std::size_t last_item) {
    const std::vector<int> ranks = pieces_.back().ranks;
    const auto degree = static_cast<int>(ranks.size());
    const auto newest = static_cast<std::size_t>(pieces_.back().items.back());
    const bool opened_alone = pieces_.back().items.size() == 1;
    for (std::size_t i = opened_alone ? 0 : newest + 1; i < used_.size(); ++i) {
      const balance::Item& item = model_.items[i];
      if (used_[i] || tokens_ + item.tokens > model_.holds(degree)) continue;
      const std::vector<double> before = free_;
      const double more = model_.time(item, degree) - model_.cost.fixed;
      bool late = false;
      for (const int rank : ranks) {
        free_[static_cast<std::size_t>(rank)] += more;
        late = late || free_[static_cast<std::size_t>(rank)] >= goal();
      }
      if (!late) {
        pieces_.back().items.push_back(static_cast<int>(i));
        used_[i] = 1;
        --left_;
        tokens_ += item.tokens;
        descend_(last_start, last_item);
        tokens_ -= item.tokens;
        ++left_;
        used_[i] = 0;
        pieces_.back().items.pop_back();
      }
      free_ = before;
    }
  }

  const balance::Model& model_;
  balance::Schedule best_;
  double bound_;
  std::int64_t limit_;
  std::int64_t visited_ = 0;
  std::size_t left_ = 0;
  std::int64_t tokens_ = 0;  ///< of the unit opened last
  std::vector<double> free_;
  std::vector<char> used_;
  std::vector<balance::Piece> pieces_;
};

class ExactStrategy final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    return solve_exact(problem).slots;
  }
};

}  // namespace

ExactResult solve_exact(const PlanProblem& problem, std::int64_t visit_limit) {
  problem.validate();
  // Where to start from: the scheduler's plan. Its items may ride together, the oracle's do not.
  balance::Model shared(problem);
  balance::Schedule first = balance::search(shared);
  ExactResult result;
  result.slots = balance::to_slots(problem, shared, first.pieces);
  result.makespan = first.makespan;
  const balance::Model model(problem);
  Exact search(model, {{}, first.makespan, 0.0}, lower_bound(problem), visit_limit);
  search.run();
  if (!search.best().pieces.empty()) {
    result.slots = balance::to_slots(problem, model, search.best().pieces);
    result.makespan = search.best().makespan;
  }
  result.optimal = search.complete();
  result.visited = search.visited();
  return result;
}

std::shared_ptr<BalanceStrategy> make_exact() { return std::make_shared<ExactStrategy>(); }

}  // namespace meshloom::plan
