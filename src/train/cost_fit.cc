#include "train/internal/cost_fit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace meshloom::train::detail {

namespace {

constexpr std::size_t kNewestUnits = 1024;
constexpr std::size_t kFewestUnits = 12;
/// Relative errors beyond this count linearly, not squared.
constexpr double kHuber = 0.3;
constexpr int kReweightings = 5;
constexpr int kSweeps = 200;

/// Work per second is quadratic * x0 + linear * x1 + fixed * x2.
using Row = std::array<double, 3>;

Row features(const UnitObservation& unit) {
  return {unit.square_sum / unit.degree, unit.token_sum / unit.degree, 1.0};
}

/// Non-negative least squares by coordinate descent on the normal equations.
Row solve(const std::array<Row, 3>& gram, const Row& target) {
  Row x{};
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (gram[i][i] <= 0.0) continue;
      double rest = target[i];
      for (std::size_t j = 0; j < x.size(); ++j) {
        if (j != i) rest -= gram[i][j] * x[j];
      }
      x[i] = std::max(0.0, rest / gram[i][i]);
    }
  }
  return x;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void CostFit::add(const UnitObservation& observation) {
  if (!(observation.busy_seconds > 0.0) || observation.token_sum <= 0.0) return;
  observations_.push_back(observation);
  if (observations_.size() > kNewestUnits) observations_.pop_front();
}

void CostFit::refit() {
  if (observations_.size() < kFewestUnits) return;
  // Columns are scaled to their largest value, so that the descent is well conditioned.
  Row largest{};
  for (const UnitObservation& unit : observations_) {
    const Row x = features(unit);
    for (std::size_t i = 0; i < x.size(); ++i) {
      largest[i] = std::max(largest[i], x[i] / unit.busy_seconds);
    }
  }
  Row solution{};
  for (int round = 0; round < kReweightings; ++round) {
    std::array<Row, 3> gram{};
    Row target{};
    for (const UnitObservation& unit : observations_) {
      Row x = features(unit);
      double fitted = 0.0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] /= unit.busy_seconds * largest[i];
        fitted += solution[i] * x[i];
      }
      const double error = std::abs(fitted - 1.0);
      const double weight = round == 0 || error <= kHuber ? 1.0 : kHuber / error;
      for (std::size_t i = 0; i < x.size(); ++i) {
        target[i] += weight * x[i];
        for (std::size_t j = 0; j < x.size(); ++j) gram[i][j] += weight * x[i] * x[j];
      }
    }
    solution = solve(gram, target);
  }
  CostModel fitted{.quadratic = solution[0] / largest[0],
                   .linear = solution[1] / largest[1],
                   .fixed = solution[2] / largest[2],
                   .exchange = 0.0};
  if (!std::isfinite(fitted.quadratic + fitted.linear + fitted.fixed) ||
      fitted.quadratic + fitted.linear <= 0.0) {
    return;
  }
  std::vector<double> transfers;
  for (const UnitObservation& unit : observations_) {
    if (unit.degree < 2) continue;
    transfers.push_back(unit.wait_seconds * unit.degree / (unit.degree - 1) / unit.token_sum);
  }
  fitted.exchange = median(std::move(transfers));
  model_ = fitted;
}

}  // namespace meshloom::train::detail
