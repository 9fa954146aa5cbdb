#include "meshloom/plan/partition.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <queue>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::plan {
namespace {

constexpr const char* kPartition = "plan.partition";

/// One part of a partial partition.
struct Part {
  double sum = 0.0;
  std::vector<std::size_t> members;
};

/// A partial partition: parts by sum, descending.
struct Partial {
  std::vector<Part> parts;
  std::size_t made = 0;  ///< breaks ties: older first
  [[nodiscard]] double spread() const { return parts.front().sum - parts.back().sum; }
};

std::vector<std::size_t> largest_first(std::span<const double> costs) {
  std::vector<std::size_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  return order;
}

Partition longest_first(std::span<const double> costs, std::size_t parts, bool equal_sizes) {
  Partition result(parts);
  using Entry = std::pair<double, std::size_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> open;
  for (std::size_t p = 0; p < parts; ++p) open.emplace(0.0, p);
  const std::size_t whole = costs.size() / parts;
  std::size_t larger = costs.size() % parts;  // parts that may still take one more
  for (const std::size_t index : largest_first(costs)) {
    Entry least = open.top();
    open.pop();
    if (equal_sizes) {
      while (result[least.second].size() == whole && larger == 0) {
        least = open.top();
        open.pop();
      }
      if (result[least.second].size() == whole) --larger;
    }
    result[least.second].push_back(index);
    const bool full = equal_sizes && result[least.second].size() > whole;
    if (!full) open.emplace(least.first + costs[index], least.second);
  }
  return result;
}

Partition karmarkar_karp(std::span<const double> costs, std::size_t parts, bool equal_sizes) {
  const std::vector<std::size_t> order = largest_first(costs);
  const auto less = [](const Partial& a, const Partial& b) {
    return a.spread() != b.spread() ? a.spread() < b.spread() : a.made > b.made;
  };
  std::vector<Partial> heap;
  const std::size_t step = equal_sizes ? parts : 1;
  for (std::size_t at = 0; at < order.size(); at += step) {
    Partial partial;
    partial.made = heap.size();
    partial.parts.resize(parts);
    for (std::size_t i = at; i < std::min(order.size(), at + step); ++i) {
      partial.parts[i - at] = {costs[order[i]], {order[i]}};
    }
    heap.push_back(std::move(partial));
  }
  if (heap.empty()) return Partition(parts);
  std::size_t made = heap.size();
  std::make_heap(heap.begin(), heap.end(), less);
  while (heap.size() > 1) {
    std::pop_heap(heap.begin(), heap.end(), less);
    Partial first = std::move(heap.back());
    heap.pop_back();
    std::pop_heap(heap.begin(), heap.end(), less);
    Partial second = std::move(heap.back());
    heap.pop_back();
    for (std::size_t p = 0; p < parts; ++p) {  // the largest with the smallest
      Part& into = first.parts[p];
      Part& from = second.parts[parts - 1 - p];
      into.sum += from.sum;
      if (into.members.size() < from.members.size()) std::swap(into.members, from.members);
      into.members.insert(into.members.end(), from.members.begin(), from.members.end());
    }
    std::stable_sort(first.parts.begin(), first.parts.end(),
                     [](const Part& a, const Part& b) { return a.sum > b.sum; });
    first.made = made++;
    heap.push_back(std::move(first));
    std::push_heap(heap.begin(), heap.end(), less);
  }
  Partition result;
  for (Part& part : heap.front().parts) result.push_back(std::move(part.members));
  return result;
}

}  // namespace

Partition partition(std::span<const double> costs, int parts, PartitionMethod method,
                    bool equal_sizes) {
  MESHLOOM_CHECK_GE(parts, 1, kPartition, "parts");
  for (std::size_t i = 0; i < costs.size(); ++i) {
    MESHLOOM_CHECK(std::isfinite(costs[i]) && costs[i] >= 0.0, kPartition,
                   fmt::format("costs[{}] is {}, expected finite and >= 0", i, costs[i]));
  }
  const auto count = static_cast<std::size_t>(parts);
  Partition result = method == PartitionMethod::kLongestFirst
                         ? longest_first(costs, count, equal_sizes)
                         : karmarkar_karp(costs, count, equal_sizes);
  for (auto& part : result) std::sort(part.begin(), part.end());
  return result;
}

Partition partition_in_groups(std::span<const double> costs, std::span<const int> group_of,
                              int groups, int parts_per_group, PartitionMethod method,
                              bool equal_sizes) {
  MESHLOOM_CHECK_EQ(costs.size(), group_of.size(), kPartition, "costs and group_of");
  MESHLOOM_CHECK_GE(groups, 1, kPartition, "groups");
  MESHLOOM_CHECK_GE(parts_per_group, 1, kPartition, "parts_per_group");
  std::vector<std::vector<std::size_t>> members(static_cast<std::size_t>(groups));
  for (std::size_t i = 0; i < group_of.size(); ++i) {
    MESHLOOM_CHECK(group_of[i] >= 0 && group_of[i] < groups, kPartition,
                   fmt::format("group_of[{}] is {}, expected 0 .. {}", i, group_of[i], groups - 1));
    members[static_cast<std::size_t>(group_of[i])].push_back(i);
  }
  Partition result;
  std::vector<double> own;
  for (const auto& group : members) {
    own.clear();
    for (const std::size_t index : group) own.push_back(costs[index]);
    for (auto& part : partition(own, parts_per_group, method, equal_sizes)) {
      for (std::size_t& index : part) index = group[index];
      result.push_back(std::move(part));
    }
  }
  return result;
}

double imbalance(std::span<const double> costs, const Partition& partition) {
  double largest = 0.0;
  double total = 0.0;
  for (const auto& part : partition) {
    double sum = 0.0;
    for (const std::size_t index : part) sum += costs[index];
    largest = std::max(largest, sum);
    total += sum;
  }
  return total > 0.0 ? largest * static_cast<double>(partition.size()) / total : 1.0;
}

}  // namespace meshloom::plan
