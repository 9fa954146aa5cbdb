#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "meshloom/core/random.h"
#include "meshloom/plan/strategy.h"

/// Length mixes made from published figures.
namespace meshloom::benchmarks {

/// Log-normal body with its median near 600 tokens, and a Pareto tail from 4K on, clipped to 196K
/// and to what the axis holds.
inline plan::PlanProblem web_mix(int ranks, int documents, std::int64_t capacity,
                                 std::uint64_t seed) {
  plan::PlanProblem problem;
  problem.layout.hdp = ranks;
  problem.capacity_tokens = capacity;
  const std::uint64_t key = random_key("lengths", seed);
  const double most = std::min<double>(196608.0, static_cast<double>(capacity) * ranks);
  for (int i = 0; i < documents; ++i) {
    const bool tail = random_uniform(key, 2 * i) < 0.05;
    const double length = tail ? 4096.0 / (1.0 - random_uniform(key, 2 * i + 1))
                               : 600.0 * std::exp(random_normal(key, 1000000 + i));
    const auto tokens = static_cast<std::int64_t>(std::clamp(length, 1.0, most));
    problem.samples.push_back({i, tokens, tokens - 1});
  }
  return problem;
}

/// A density of x^-a between two lengths, with `a` such that the mean is as asked.
class Stretch {
 public:
  Stretch(double low, double high, double mean) : low_(low), high_(high) {
    double from = -4.0;
    double to = 6.0;
    for (int i = 0; i < 80; ++i) {
      exponent_ = 0.5 * (from + to);
      (moment(2.0) / moment(1.0) > mean ? from : to) = exponent_;
    }
  }
  [[nodiscard]] double draw(double uniform) const {
    const double e = power(1.0);
    const double a = std::pow(low_, e);
    return std::pow(a + uniform * (std::pow(high_, e) - a), 1.0 / e);
  }

 private:
  [[nodiscard]] double power(double order) const {
    const double e = order - exponent_;
    return std::abs(e) < 1e-9 ? 1e-9 : e;
  }
  [[nodiscard]] double moment(double order) const {
    const double e = power(order);
    return (std::pow(high_, e) - std::pow(low_, e)) / e;
  }
  double low_;
  double high_;
  double exponent_ = 1.0;
};

/// ByteScale's production mix: 80 % of samples up to 4K tokens; 1 % from 128K on, with 44.3 % of
/// the tokens; 0.05 % of 2M, with 12.1 % of the tokens.
inline std::vector<std::int64_t> production_mix(std::int64_t tokens, std::uint64_t seed) {
  constexpr double kLongest = 2097152.0;
  constexpr double kMean = 0.0005 * kLongest / 0.121;
  // What the shares leave for the middle; the body has the rest with a mean of its own.
  const Stretch body(32.0, 4096.0, 1200.0);
  const Stretch middle(4096.0, 131072.0, (0.557 * kMean - 0.8 * 1200.0) / 0.19);
  const Stretch tail(131072.0, kLongest, 0.322 * kMean / 0.0095);
  const std::uint64_t key = random_key("production", seed);
  std::vector<std::int64_t> lengths;
  std::int64_t sum = 0;
  for (std::uint64_t i = 0; sum < tokens; ++i) {
    const double kind = random_uniform(key, 2 * i);
    const double where = random_uniform(key, 2 * i + 1);
    const double length = kind < 0.8      ? body.draw(where)
                          : kind < 0.99   ? middle.draw(where)
                          : kind < 0.9995 ? tail.draw(where)
                                          : kLongest;
    lengths.push_back(std::max<std::int64_t>(1, static_cast<std::int64_t>(length)));
    sum += lengths.back();
  }
  return lengths;
}

}  // namespace meshloom::benchmarks
