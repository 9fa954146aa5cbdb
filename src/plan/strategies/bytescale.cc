#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "plan/balance/fill.h"
#include "plan/balance/model.h"
#include "plan/strategies/strategies.h"

namespace meshloom::plan {
namespace {

/// What the published algorithm leaves open, and how it is closed here:
/// * all times are 0 at first, so nobody is behind: a round without targets takes every rank;
/// * the number of buckets and delta are not given: kBuckets, and kDelta of the mean load;
/// * which ranks a D-rank sequence takes: the D least loaded, targets or not, ties by rank, and it
///   starts when the last of them is free; the ring order is by rank;
/// * picks are one sequence at a time; short ones join the open bin of their rank while it holds
///   them;
/// * degrees are memory's, raised so that no sequence alone exceeds the lower bound (the paper's
///   equation would let one sequence become the makespan).
constexpr int kBuckets = 16;
constexpr double kDelta = 0.01;

class Bytescale final : public BalanceStrategy {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override;
};

/// Item indices in buckets of about equal work, longest items first.
std::vector<std::vector<int>> make_buckets(const balance::Model& model) {
  std::vector<std::vector<int>> buckets(1);
  double filled = 0.0;
  for (std::size_t i = 0; i < model.items.size(); ++i) {
    const double limit = model.total_work * static_cast<double>(buckets.size()) / kBuckets;
    if (filled >= limit && buckets.size() < kBuckets) buckets.emplace_back();
    buckets.back().push_back(static_cast<int>(i));
    filled += model.items[i].work;
  }
  return buckets;
}

std::vector<Slot> Bytescale::assign(const PlanProblem& problem) const {
  const balance::Model model(problem);
  std::vector<std::vector<int>> buckets = make_buckets(model);
  for (auto& bucket : buckets) std::reverse(bucket.begin(), bucket.end());  // taken from the back
  const bool across = problem.layout.pp > 1;  // PP-balance: pick across all buckets
  const double delta = kDelta * model.total_work / model.ranks;
  const auto ranks = static_cast<std::size_t>(model.ranks);
  std::vector<double> time(ranks, 0.0);
  std::vector<int> open(ranks, -1);  // piece that takes more short items
  std::vector<std::int64_t> room(ranks, 0);
  std::vector<balance::Piece> pieces;
  std::vector<int> order(ranks);
  std::iota(order.begin(), order.end(), 0);
  std::size_t next_bucket = 0;
  const auto pick = [&] {
    if (across && next_bucket >= buckets.size()) next_bucket = 0;
    auto& bucket = buckets[across ? next_bucket : 0];
    const int index = bucket.back();
    bucket.pop_back();
    if (bucket.empty()) {
      buckets.erase(buckets.begin() + static_cast<std::ptrdiff_t>(across ? next_bucket : 0));
    } else {
      ++next_bucket;
    }
    return index;
  };
  while (!buckets.empty()) {
    const double most = *std::max_element(time.begin(), time.end());
    const auto least = [&] {
      return static_cast<std::size_t>(std::min_element(time.begin(), time.end()) - time.begin());
    };
    const bool nobody_behind = most - time[least()] <= delta;
    const double level = nobody_behind ? std::numeric_limits<double>::infinity() : most;
    while (!buckets.empty() && level - time[least()] > delta) {
      const int index = pick();
      const balance::Item& item = model.items[static_cast<std::size_t>(index)];
      const int degree = model.degree(item, model.bound);
      if (degree == 1) {
        const std::size_t rank = least();
        double added = item.work;
        if (open[rank] < 0 || room[rank] < item.tokens) {
          open[rank] = static_cast<int>(pieces.size());
          room[rank] = model.capacity;
          pieces.push_back({{static_cast<int>(rank)}, {}});
          added += model.cost.fixed;
        }
        pieces[static_cast<std::size_t>(open[rank])].items.push_back(index);
        room[rank] -= item.tokens;
        time[rank] += added;
      } else {
        std::partial_sort(order.begin(), order.begin() + degree, order.end(), [&](int a, int b) {
          const double x = time[static_cast<std::size_t>(a)];
          const double y = time[static_cast<std::size_t>(b)];
          return x != y ? x < y : a < b;
        });
        std::vector<int> members(order.begin(), order.begin() + degree);
        const double end =
            time[static_cast<std::size_t>(members.back())] + model.time(item, degree);
        std::sort(members.begin(), members.end());
        for (const int rank : members) {
          time[static_cast<std::size_t>(rank)] = end;
          open[static_cast<std::size_t>(rank)] = -1;
        }
        pieces.push_back({std::move(members), {index}});
      }
      if (nobody_behind) break;  // one pick makes a maximum to fall behind
    }
  }
  return balance::to_slots(problem, model, pieces);
}

}  // namespace

std::shared_ptr<BalanceStrategy> make_bytescale() { return std::make_shared<Bytescale>(); }

}  // namespace meshloom::plan
