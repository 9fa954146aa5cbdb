#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "meshloom/plan/strategy.h"

namespace meshloom::plan::balance {

/// A sample as the scheduler sees it, or several that share a unit from the start.
struct Item {
  int sample = 0;  ///< index into PlanProblem::samples
  int group = -1;  ///< index into Model::groups: samples that ride along; -1: none
  std::int64_t tokens = 0;
  double work = 0.0;
  int memory_degree = 1;  ///< fewest ranks that hold it, offloading what it takes
};

/// The problem in the scheduler's terms: items longest first, figures that every phase needs.
struct Model {
  explicit Model(const PlanProblem& problem);

  int ranks = 1;
  int ranks_per_node = 1;  ///< `ranks` where the problem knows no nodes
  std::int64_t capacity = 1;
  MemoryModel memory;
  CostModel cost;
  std::vector<Item> items;
  std::vector<std::vector<int>> groups;
  double total_work = 0.0;
  std::int64_t total_tokens = 0;
  double bound = 0.0;  ///< proven lower bound on the makespan
  /// Exchange tokens of power-of-two degrees that just fit memory: the yardstick for traffic.
  double reference_exchange = 0.0;

  /// Lets short samples ride in the space that long ones leave in their units, where the fixed cost
  /// of the units saved outweighs the traffic.
  /// @param traffic_price  price of one exchange token, as a part of the makespan
  void share_units_(double traffic_price);

  /// Most tokens that a unit of `degree` ranks holds, everything offloaded that can be.
  [[nodiscard]] std::int64_t holds(int degree) const {
    return memory.unit_capacity(capacity, degree, 1.0);
  }
  /// Time of a unit that holds this item alone, on each of its ranks.
  [[nodiscard]] double time(const Item& item, int degree) const {
    return cost.unit_time(item.work, item.tokens, degree);
  }
  /// More ranks than tokens would leave some without any.
  [[nodiscard]] int most_ranks(const Item& item) const {
    return std::max(item.memory_degree,
                    static_cast<int>(std::min<std::int64_t>(item.tokens, ranks)));
  }
  /// Fewest ranks that hold the item and end it within `limit`; memory's degree if no number does.
  [[nodiscard]] int degree(const Item& item, double limit) const;
  /// What an item adds to a rank's time when it shares full bins: its work and its share of the
  /// fixed cost.
  [[nodiscard]] double share(const Item& item) const {
    return item.work +
           cost.fixed * static_cast<double>(item.tokens) / static_cast<double>(capacity);
  }
};

}  // namespace meshloom::plan::balance
