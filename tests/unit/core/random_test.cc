#include "meshloom/core/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace meshloom {
namespace {

constexpr int kDraws = 200'000;
/// Five standard errors of the statistic over kDraws draws: fails by chance once in two million.
const double kFiveSigma = 5.0 / std::sqrt(kDraws);

TEST(Random, SameKeyAndCounterGiveTheSameBits) {
  EXPECT_EQ(random_bits(1, 2), random_bits(1, 2));
  EXPECT_NE(random_bits(1, 2), random_bits(2, 1));
  EXPECT_NE(random_key("a.weight", 0), random_key("b.weight", 0));
  EXPECT_NE(random_key("a.weight", 0), random_key("a.weight", 1));
}

TEST(Random, NeighbouringCountersDoNotCollide) {
  std::set<std::uint64_t> seen;
  for (std::uint64_t counter = 0; counter < 10'000; ++counter) {
    seen.insert(random_bits(7, counter));
    seen.insert(random_bits(8, counter));
  }
  EXPECT_EQ(seen.size(), 20'000U);
}

TEST(Random, UniformHasItsMoments) {
  double sum = 0;
  double square = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = random_uniform(3, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    square += u * u;
  }
  EXPECT_NEAR(sum / kDraws, 0.5, kFiveSigma * std::sqrt(1.0 / 12));
  EXPECT_NEAR(square / kDraws, 1.0 / 3, kFiveSigma * std::sqrt(4.0 / 45));
}

TEST(Random, NormalHasItsMoments) {
  double sum = 0;
  double square = 0;
  double neighbours = 0;
  double previous = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = random_normal(random_key("w", 1), i);
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    square += x * x;
    neighbours += x * previous;
    previous = x;
  }
  EXPECT_NEAR(sum / kDraws, 0.0, kFiveSigma);
  EXPECT_NEAR(square / kDraws, 1.0, kFiveSigma * std::sqrt(2.0));
  EXPECT_NEAR(neighbours / kDraws, 0.0, kFiveSigma);
}

}  // namespace
}  // namespace meshloom
