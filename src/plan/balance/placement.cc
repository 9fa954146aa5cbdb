#include "plan/balance/placement.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

namespace meshloom::plan::balance {

namespace {

/// Without nodes, an axis beyond kWholeAxis ranks is searched in parts of kPart ranks.
constexpr int kWholeAxis = 1024;
constexpr int kPart = 256;
/// Ranks that the search for one unit's place looks at.
constexpr std::size_t kScanned = 1024;
/// A unit that ends later than this beyond the target may leave its node.
constexpr double kTargetSlack = 1e-3;

/// Levels of load that `degrees_from` tells apart, and ranks beyond the fewest that it offers.
constexpr std::size_t kLevels = 8;
constexpr int kMore = 3;

int part_size(const Model& model) {
  if (model.ranks_per_node < model.ranks) return model.ranks_per_node;
  return model.ranks <= kWholeAxis ? model.ranks : kPart;
}

}  // namespace

Placement::Placement(const Model& model)
    : model_(model),
      node_size_(static_cast<std::size_t>(part_size(model))),
      nodes_((static_cast<std::size_t>(model.ranks) + node_size_ - 1) / node_size_) {}

std::size_t Placement::node_end(std::size_t node) const {
  return std::min(static_cast<std::size_t>(model_.ranks), (node + 1) * node_size_);
}

double Placement::mean_load(std::size_t node) const {
  const std::size_t size = node_end(node) - node * node_size_;
  return prefix_[node * (node_size_ + 1) + size] / static_cast<double>(size);
}

void Placement::reset_() {
  const auto ranks = static_cast<std::size_t>(model_.ranks);
  load_.assign(ranks, 0.0);
  prefix_.assign(nodes_ * (node_size_ + 1), 0.0);
  rank_.resize(ranks);
  std::iota(rank_.begin(), rank_.end(), 0);
  node_order_.resize(nodes_);
  std::iota(node_order_.begin(), node_order_.end(), std::size_t{0});
  ranks_.clear();
  offset_.assign(1, 0);
  start_.clear();
  end_.clear();
  gaps_ = 0.0;
}

Placement::Window Placement::window_in(std::size_t node, int degree, double time, double target,
                                       const PlacementRule& rule) const {
  const auto width = static_cast<std::size_t>(degree);
  const std::size_t first = node * node_size_;
  const double* prefix = prefix_.data() + node * (node_size_ + 1);
  const std::size_t size = node_end(node) - first;
  Window best;
  best.price = std::numeric_limits<double>::infinity();
  for (std::size_t at = 0; at + width <= size; ++at) {
    const double start = load_[first + at + width - 1];
    const double gap = degree * start - (prefix[at + width] - prefix[at]);
    const double over = std::max(0.0, start + time - target);
    const double price = gap + degree * (rule.overflow * over + rule.low * start);
    if (price < best.price) best = {first + at, start, price};
  }
  return best;
}

Placement::Window Placement::best_window(int degree, double time, double target,
                                         const PlacementRule& rule) const {
  Window best;
  best.price = std::numeric_limits<double>::infinity();
  std::size_t scanned = 0;
  for (const std::size_t node : node_order_) {
    const Window window = window_in(node, degree, time, target, rule);
    if (window.price < best.price) best = window;
    scanned += node_size_;
    if (scanned >= kScanned && best.price < std::numeric_limits<double>::infinity()) break;
  }
  return best;
}

void Placement::raise_(std::size_t begin, std::size_t width, double end) {
  const std::size_t node = begin / node_size_;
  const std::size_t first = node * node_size_;
  const std::size_t last = node_end(node);
  moved_.assign(rank_.begin() + static_cast<std::ptrdiff_t>(begin),
                rank_.begin() + static_cast<std::ptrdiff_t>(begin + width));
  // Ranks behind the window that stay less loaded than it will be move in front of it.
  std::size_t to = begin;
  for (std::size_t from = begin + width; from < last && load_[from] < end; ++from, ++to) {
    load_[to] = load_[from];
    rank_[to] = rank_[from];
  }
  for (std::size_t i = 0; i < width; ++i) {
    load_[to + i] = end;
    rank_[to + i] = moved_[i];
  }
  double* prefix = prefix_.data() + node * (node_size_ + 1);
  for (std::size_t i = begin - first; i < last - first; ++i) {
    prefix[i + 1] = prefix[i] + load_[first + i];
  }
  ranks_.insert(ranks_.end(), moved_.begin(), moved_.end());
}

void Placement::reorder_(std::size_t node) {
  if (nodes_ == 1) return;
  const double mean = mean_load(node);
  auto at = std::find(node_order_.begin(), node_order_.end(), node);
  for (auto next = at + 1; next != node_order_.end() && mean_load(*next) < mean; ++at, ++next) {
    std::iter_swap(at, next);
  }
}

void Placement::record_(double start, double time, double gap) {
  offset_.push_back(ranks_.size());
  start_.push_back(start);
  end_.push_back(start + time);
  gaps_ += gap;
}

double Placement::fillable(std::size_t begin, std::size_t width, double start) const {
  double sum = 0.0;
  for (std::size_t i = begin; i < begin + width; ++i) {
    const double gap = start - load_[i];
    // On average the last of the units that fill a gap is half empty.
    if (gap > least_gap(model_)) sum += gap - 0.5 * model_.cost.fixed;
  }
  return sum;
}

void Placement::place_inside_(int degree, double time, double target, const PlacementRule& rule) {
  const Window window = best_window(degree, time, target, rule);
  const auto width = static_cast<std::size_t>(degree);
  if (nodes_ > 1 && window.start + time > target * (1.0 + kTargetSlack) &&
      place_scattered_(degree, time, window.start)) {
    return;  // locality first, but not at the price of the makespan
  }
  const double gap = fillable(window.begin, width, window.start);
  raise_(window.begin, width, window.start + time);
  reorder_(window.begin / node_size_);
  record_(window.start, time, gap);
}

bool Placement::place_scattered_(int degree, double time, double before) {
  // The least loaded ranks of all nodes: a heap of each node's next one.
  using Next = std::pair<double, std::size_t>;  // load, position
  std::vector<Next> heap;
  for (std::size_t node = 0; node < nodes_; ++node) {
    heap.emplace_back(load_[node * node_size_], node * node_size_);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  std::vector<std::size_t> taken(nodes_, 0);
  double start = 0.0;
  for (int i = 0; i < degree; ++i) {
    if (heap.empty()) return false;
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const auto [load, at] = heap.back();
    start = load;
    const std::size_t node = at / node_size_;
    ++taken[node];
    if (at + 1 < node_end(node)) {
      heap.back() = {load_[at + 1], at + 1};
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    } else {
      heap.pop_back();
    }
  }
  if (start >= before) return false;
  double gap = 0.0;
  for (std::size_t node = 0; node < nodes_; ++node) {
    if (taken[node] == 0) continue;
    gap += fillable(node * node_size_, taken[node], start);
    raise_(node * node_size_, taken[node], start + time);
  }
  for (std::size_t node = 0; node < nodes_; ++node) {
    if (taken[node] > 0) reorder_(node);
  }
  record_(start, time, gap);
  return true;
}

void Placement::place_across_(int degree, double time, double target, const PlacementRule& rule) {
  // A run of nodes in load order: whole ones, and the least loaded ranks of the last.
  struct Run {
    std::size_t at = 0;
    double start = 0.0;
    double price = std::numeric_limits<double>::infinity();
  } best;
  const auto size_of = [&](std::size_t node) { return node_end(node) - node * node_size_; };
  const std::size_t tried = std::min(nodes_, std::max<std::size_t>(8, kScanned / node_size_));
  for (std::size_t at = 0; at < tried; ++at) {
    std::size_t left = static_cast<std::size_t>(degree);
    double start = 0.0;
    double sum = 0.0;
    for (std::size_t i = at; i < nodes_ && left > 0; ++i) {
      const std::size_t node = node_order_[i];
      const std::size_t taken = std::min(left, size_of(node));
      start = std::max(start, load_[node * node_size_ + taken - 1]);
      sum += prefix_[node * (node_size_ + 1) + taken];
      left -= taken;
    }
    if (left > 0) break;
    const double gap = degree * start - sum;
    const double over = std::max(0.0, start + time - target);
    const double price = gap + degree * (rule.overflow * over + rule.low * start);
    if (price < best.price) best = {at, start, price};
  }
  if (best.start + time > target * (1.0 + kTargetSlack) &&
      place_scattered_(degree, time, best.start)) {
    return;
  }
  std::vector<std::size_t> run;
  double fillable_gap = 0.0;
  std::size_t left = static_cast<std::size_t>(degree);
  for (std::size_t i = best.at; left > 0; ++i) {
    const std::size_t node = node_order_[i];
    const std::size_t taken = std::min(left, size_of(node));
    fillable_gap += fillable(node * node_size_, taken, best.start);
    raise_(node * node_size_, taken, best.start + time);
    run.push_back(node);
    left -= taken;
  }
  for (std::size_t i = run.size(); i-- > 0;) reorder_(run[i]);
  record_(best.start, time, fillable_gap);
}

void Placement::place_job_(const Job& job, double target, const PlacementRule& rule) {
  const double time = model_.time(model_.items[static_cast<std::size_t>(job.item)], job.degree);
  if (static_cast<std::size_t>(job.degree) <= node_size_) {
    place_inside_(job.degree, time, target, rule);
  } else {
    place_across_(job.degree, time, target, rule);
  }
}

bool Placement::place(std::span<const Job> jobs, double target, const PlacementRule& rule,
                      double latest) {
  if (latest < 0.0) return false;
  reset_();
  for (const Job& job : jobs) {
    place_job_(job, target, rule);
    if (end_.back() > latest) return false;
  }
  return true;
}

std::vector<int> Placement::degrees_from(int least) const {
  const std::size_t node = node_order_.front();
  const std::size_t first = node * node_size_;
  std::vector<std::size_t> edges{first};  // where loads change
  for (std::size_t i = first + 1; i < node_end(node) && edges.size() < kLevels; ++i) {
    if (load_[i] > load_[i - 1]) edges.push_back(i);
  }
  edges.push_back(node_end(node));
  std::vector<int> degrees;
  for (int more = 0; more <= kMore; ++more) degrees.push_back(least + more);
  for (std::size_t a = 0; a < edges.size(); ++a) {
    for (std::size_t b = a + 1; b < edges.size(); ++b) {
      degrees.push_back(static_cast<int>(edges[b] - edges[a]));
    }
  }
  std::sort(degrees.begin(), degrees.end());
  degrees.erase(std::unique(degrees.begin(), degrees.end()), degrees.end());
  std::erase_if(degrees, [&](int degree) {
    return degree < least || static_cast<std::size_t>(degree) > node_size_;
  });
  return degrees;
}

void Placement::place_freely(std::span<Job> jobs, double target, const PlacementRule& rule,
                             double traffic_price) {
  reset_();
  for (Job& job : jobs) {
    const Item& item = model_.items[static_cast<std::size_t>(job.item)];
    double best = std::numeric_limits<double>::infinity();
    const int least = job.degree;
    for (const int degree : degrees_from(least)) {
      if (degree > std::max(least, model_.most_ranks(item))) continue;
      const Window window = best_window(degree, model_.time(item, degree), target, rule);
      const double price =
          window.price + traffic_price * (degree - least) * static_cast<double>(item.tokens);
      if (price >= best) continue;
      best = price;
      job.degree = degree;
    }
    place_job_(job, target, rule);
  }
}

double Placement::estimate(std::span<const double> singles, double fluid) {
  // Longest first onto the least loaded rank.
  scratch_ = load_;
  for (double& load : scratch_) load += 0.5 * model_.cost.fixed;  // the last unit is half empty
  const auto later = [](double a, double b) { return a > b; };
  std::make_heap(scratch_.begin(), scratch_.end(), later);
  for (const double work : singles) {
    std::pop_heap(scratch_.begin(), scratch_.end(), later);
    scratch_.back() += work;
    std::push_heap(scratch_.begin(), scratch_.end(), later);
  }
  std::sort(scratch_.begin(), scratch_.end());
  // The fluid fills the gaps in front of waiting units, then levels the ends.
  double left = fluid - gaps_;
  double level = scratch_.front();
  for (std::size_t i = 1; i < scratch_.size() && left > 0.0; ++i) {
    const double step = static_cast<double>(i) * (scratch_[i] - level);
    if (step >= left) return std::max(scratch_.back(), level + left / static_cast<double>(i));
    left -= step;
    level = scratch_[i];
  }
  if (left <= 0.0) return scratch_.back();
  return scratch_.back() + left / static_cast<double>(scratch_.size());
}

}  // namespace meshloom::plan::balance
