#pragma once

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

/// Where the units of one list of jobs go: start times and ranks, in placement order.
class Placement {
 public:
  explicit Placement(const Model& model) : model_(model) {}

  /// Places `jobs` in the given order on empty ranks. `target` is the makespan aimed at.
  void place(std::span<const Job> jobs, double target, const PlacementRule& rule);

  /// Makespan to expect when `singles` (items of degree 1 too large to count as a fluid, largest
  /// first) and `fluid` more work fill the gaps.
  [[nodiscard]] double estimate(std::span<const double> singles, double fluid);

  [[nodiscard]] std::span<const int> ranks_of(std::size_t job) const {
    return std::span<const int>(ranks_).subspan(offset_[job], offset_[job + 1] - offset_[job]);
  }
  [[nodiscard]] double start_of(std::size_t job) const { return start_[job]; }
  [[nodiscard]] double end_of(std::size_t job) const { return end_[job]; }
  [[nodiscard]] std::size_t jobs() const { return start_.size(); }
  /// Idle rank time before units that wait for their peers.
  [[nodiscard]] double gaps() const { return gaps_; }

 private:
  std::size_t best_window(int degree, double time, double target, const PlacementRule& rule,
                          std::size_t first, std::size_t last, double& price) const;
  void take_(std::size_t begin, int degree, double end, std::size_t last);

  const Model& model_;
  std::vector<double> load_;    ///< ascending inside each node's range
  std::vector<int> rank_;       ///< the rank that has load_[i]
  std::vector<double> prefix_;  ///< prefix_[i] = sum of load_[0 .. i)
  std::vector<int> ranks_;      ///< ranks of all jobs, one after another
  std::vector<std::size_t> offset_;
  std::vector<double> start_, end_;
  std::vector<double> scratch_;
  double gaps_ = 0.0;
};

}  // namespace meshloom::plan::balance
