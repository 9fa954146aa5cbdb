#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/balance/model.h"

namespace meshloom::plan::balance {

/// One multi-rank unit to place.
struct Job {
  int item = 0;
  int degree = 2;
};

/// How units choose their ranks; the search tries several.
struct PlacementRule {
  double low = 0.02;      ///< price of starting late: favours the least loaded ranks
  double overflow = 4.0;  ///< price of ending beyond the target
};

/// Where the units of one list of jobs go: start times and ranks, in placement order. A unit stays
/// inside a node if one holds it without ending beyond the target; a wider one takes whole nodes
/// and a part of one more.
class Placement {
 public:
  explicit Placement(const Model& model);

  /// Places `jobs` in the given order on empty ranks. `target` is the makespan aimed at.
  /// @returns false as soon as one ends after `latest`: what is placed then is of no use
  bool place(std::span<const Job> jobs, double target, const PlacementRule& rule, double latest);

  /// The same, and gives each job the degree, at least its own, at which its place is cheapest:
  /// often just as many ranks as are free together.
  /// @param traffic_price  price of one exchange token, in rank time
  void place_freely(std::span<Job> jobs, double target, const PlacementRule& rule,
                    double traffic_price);

  /// Makespan to expect when `singles` (items of degree 1 too large to count as a fluid, largest
  /// first) and `fluid` more work fill the gaps.
  [[nodiscard]] double estimate(std::span<const double> singles, double fluid);

  /// Ascending.
  [[nodiscard]] std::vector<int> ranks_of(std::size_t job) const {
    std::vector<int> ranks(ranks_.begin() + static_cast<std::ptrdiff_t>(offset_[job]),
                           ranks_.begin() + static_cast<std::ptrdiff_t>(offset_[job + 1]));
    std::sort(ranks.begin(), ranks.end());
    return ranks;
  }
  [[nodiscard]] double start_of(std::size_t job) const { return start_[job]; }
  [[nodiscard]] double end_of(std::size_t job) const { return end_[job]; }
  [[nodiscard]] std::size_t jobs() const { return start_.size(); }
  /// A wait below this is not worth a short unit's fixed cost.
  [[nodiscard]] static double least_gap(const Model& model) { return 2.0 * model.cost.fixed; }

 private:
  /// A choice of ranks: `width` positions from `begin`, all inside one node.
  struct Window {
    std::size_t begin = 0;
    double start = 0.0;
    double price = 0.0;
  };

  void reset_();
  [[nodiscard]] std::size_t node_end(std::size_t node) const;
  [[nodiscard]] double mean_load(std::size_t node) const;
  [[nodiscard]] Window window_in(std::size_t node, int degree, double time, double target,
                                 const PlacementRule& rule) const;
  [[nodiscard]] Window best_window(int degree, double time, double target,
                                   const PlacementRule& rule) const;
  void place_job_(const Job& job, double target, const PlacementRule& rule);
  /// Numbers of ranks from `least` on that are free together on the least loaded node, and the next
  /// ones after `least`.
  [[nodiscard]] std::vector<int> degrees_from(int least) const;
  void place_inside_(int degree, double time, double target, const PlacementRule& rule);
  /// On the least loaded ranks of any node, if that starts before `before`. @returns whether it
  /// did.
  bool place_scattered_(int degree, double time, double before);
  void place_across_(int degree, double time, double target, const PlacementRule& rule);
  /// Raises `width` positions from `begin` to `end` and keeps their node sorted.
  void raise_(std::size_t begin, std::size_t width, double end);
  /// Moves a node whose load grew to its place in `node_order_`.
  void reorder_(std::size_t node);
  void record_(double start, double time, double gap);
  /// Part of the idle time that a unit starting at `start` leaves at `width` positions from `begin`
  /// which short units can fill.
  [[nodiscard]] double fillable(std::size_t begin, std::size_t width, double start) const;

  const Model& model_;
  std::size_t node_size_;  ///< ranks of a node; a virtual one where a large axis knows none
  std::size_t nodes_;
  std::vector<double> load_;             ///< ascending inside each node
  std::vector<int> rank_;                ///< the rank that has load_[i]
  std::vector<double> prefix_;           ///< sums of load_ inside each node: node_size_ + 1 a node
  std::vector<std::size_t> node_order_;  ///< by mean load, ascending
  std::vector<int> ranks_;               ///< ranks of all jobs, one after another
  std::vector<std::size_t> offset_;
  std::vector<double> start_, end_;
  std::vector<double> scratch_;
  std::vector<int> moved_;
  double gaps_ = 0.0;  ///< idle rank time in front of units, as far as it can be filled
};

}  // namespace meshloom::plan::balance
