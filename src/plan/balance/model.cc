#include "plan/balance/model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <utility>

#include "meshloom/plan/bounds.h"

namespace meshloom::plan::balance {
namespace {

/// Relative slack of comparisons between times: rounding must not cost a rank.
constexpr double kTimeSlack = 1e-9;

std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Model::Model(const PlanProblem& problem)
    : ranks(problem.layout.hdp),
      ranks_per_node(problem.ranks_per_node > 0 ? std::min(problem.ranks_per_node, ranks) : ranks),
      capacity(problem.capacity_tokens),
      memory(problem.memory),
      cost(problem.cost),
      bound(lower_bound(problem)) {
  items.resize(problem.samples.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    items[i].sample = static_cast<int>(i);
    items[i].tokens = problem.samples[i].tokens;
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.tokens != b.tokens ? a.tokens > b.tokens : a.sample < b.sample;
  });
  for (Item& item : items) {
    item.work = cost.work(item.tokens);
    total_work += item.work;
    total_tokens += item.tokens;
    // Where offload is possible, a long item takes the fewest ranks and the ratio that this needs,
    // as far as its forward hides the transfer; beyond that only where the axis is too small.
    const double hidden = memory.most_hidden(cost, item.tokens);
    item.memory_degree = memory.degree_needed(capacity, hidden, item.tokens, ranks).value_or(ranks);
    const std::int64_t resident = ceil_divide(item.tokens, capacity);
    if (resident > 1) {
      const auto held = static_cast<unsigned>(std::min<std::int64_t>(resident, ranks));
      const double rounded = std::min<double>(std::bit_ceil(held), ranks);
      reference_exchange += (rounded - 1.0) * static_cast<double>(item.tokens);
    }
  }
}

void Model::share_units_(double traffic_price) {
  if (cost.fixed <= 0.0) return;
  const auto room_of = [&](const Item& item) {
    return item.memory_degree * capacity - item.tokens;
  };
  // What a token that rides along saves, and what it costs in a unit of a given degree.
  const double saved = cost.fixed / static_cast<double>(capacity);
  const auto worth = [&](const Item& item) {
    const double others = item.memory_degree - 1.0;
    return saved > others * (cost.exchange + traffic_price * bound * ranks);
  };
  std::multimap<std::int64_t, std::size_t> rooms;
  std::size_t first_short = 0;
  for (; first_short < items.size() && items[first_short].memory_degree > 1; ++first_short) {
    if (worth(items[first_short]) && room_of(items[first_short]) > 0)
      rooms.emplace(room_of(items[first_short]), first_short);
  }
  std::vector<char> gone(items.size(), 0);
  for (std::size_t i = first_short; i < items.size() && !rooms.empty(); ++i) {
    const auto found = rooms.lower_bound(items[i].tokens);
    if (found == rooms.end()) continue;
    Item& host = items[found->second];
    if (host.group < 0) {
      host.group = static_cast<int>(groups.size());
      groups.emplace_back();
    }
    groups[static_cast<std::size_t>(host.group)].push_back(items[i].sample);
    host.tokens += items[i].tokens;
    host.work += items[i].work;
    gone[i] = 1;
    const std::size_t index = found->second;
    rooms.erase(found);
    if (room_of(host) > 0) rooms.emplace(room_of(host), index);
  }
  std::vector<Item> left;
  left.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (!gone[i]) left.push_back(items[i]);
  }
  items = std::move(left);
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.work > b.work; });
}

int Model::degree(const Item& item, double limit) const {
  if (time(item, item.memory_degree) <= limit * (1.0 + kTimeSlack)) return item.memory_degree;
  const double transfer = cost.exchange * static_cast<double>(item.tokens);
  const double left = limit - cost.fixed - transfer;
  if (item.work <= transfer) return item.memory_degree;
  const int most = most_ranks(item);
  if (left <= 0.0) return most;
  const double needed = std::ceil((item.work - transfer) / left * (1.0 - kTimeSlack));
  return std::max(item.memory_degree, static_cast<int>(std::min<double>(needed, most)));
}

}  // namespace meshloom::plan::balance
