#include "plan/balance/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace meshloom::plan::balance {

std::size_t Placement::best_window(int degree, double time, double target,
                                   const PlacementRule& rule, std::size_t first, std::size_t last,
                                   double& price) const {
  const auto width = static_cast<std::size_t>(degree);
  std::size_t best = first;
  price = std::numeric_limits<double>::infinity();
  for (std::size_t begin = first; begin + width <= last; ++begin) {
    const double start = load_[begin + width - 1];
    const double gap = degree * start - (prefix_[begin + width] - prefix_[begin]);
    const double over = std::max(0.0, start + time - target);
    const double total = gap + degree * (rule.overflow * over + rule.low * start);
    if (total < price) {
      price = total;
      best = begin;
    }
  }
  return best;
}

void Placement::take_(std::size_t begin, int degree, double end, std::size_t last) {
  const auto width = static_cast<std::size_t>(degree);
  // Ranks behind the window that are less loaded than it will be move in front of it.
  std::size_t to = begin;
  std::size_t from = begin + width;
  const std::size_t base = ranks_.size() - width;
  while (from < last && load_[from] < end) {
    load_[to] = load_[from];
    rank_[to] = rank_[from];
    ++to, ++from;
  }
  for (std::size_t i = 0; i < width; ++i) {
    load_[to + i] = end;
    rank_[to + i] = ranks_[base + i];
  }
  for (std::size_t i = begin; i < load_.size(); ++i) prefix_[i + 1] = prefix_[i] + load_[i];
}

void Placement::place(std::span<const Job> jobs, double target, const PlacementRule& rule) {
  const auto ranks = static_cast<std::size_t>(model_.ranks);
  load_.assign(ranks, 0.0);
  prefix_.assign(ranks + 1, 0.0);
  rank_.resize(ranks);
  std::iota(rank_.begin(), rank_.end(), 0);
  ranks_.clear();
  offset_.assign(1, 0);
  start_.clear();
  end_.clear();
  gaps_ = 0.0;
  for (const Job& job : jobs) {
    const auto width = static_cast<std::size_t>(job.degree);
    const double time = model_.time(model_.items[static_cast<std::size_t>(job.item)], job.degree);
    double price = 0.0;
    const std::size_t begin = best_window(job.degree, time, target, rule, 0, ranks, price);
    const double start = load_[begin + width - 1];
    gaps_ += job.degree * start - (prefix_[begin + width] - prefix_[begin]);
    ranks_.insert(ranks_.end(), rank_.begin() + static_cast<std::ptrdiff_t>(begin),
                  rank_.begin() + static_cast<std::ptrdiff_t>(begin + width));
    std::sort(ranks_.end() - static_cast<std::ptrdiff_t>(width), ranks_.end());
    start_.push_back(start);
    end_.push_back(start + time);
    offset_.push_back(ranks_.size());
    take_(begin, job.degree, start + time, ranks);
  }
}

double Placement::estimate(std::span<const double> singles, double fluid) {
  // Longest first onto the least loaded rank.
  scratch_ = load_;
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
