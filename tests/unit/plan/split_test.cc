#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/plan/schedule.h"

namespace meshloom::plan::split {
namespace {

double heaviest(const std::vector<int>& split, const std::vector<double>& layers, double first,
                double last) {
  double result = 0.0;
  auto layer = layers.begin();
  for (std::size_t v = 0; v < split.size(); ++v) {
    double work = std::accumulate(layer, layer + split[v], 0.0);
    if (v == 0) work += first;
    if (v + 1 == split.size()) work += last;
    layer += split[v];
    result = std::max(result, work);
  }
  return result;
}

/// Of all ways to cut.
double least(const std::vector<double>& layers, double first, double last, int pieces) {
  double result = std::numeric_limits<double>::infinity();
  std::vector<int> split;
  const std::function<void(int)> cut = [&](int left) {
    if (std::ssize(split) + 1 == pieces) {
      split.push_back(left);
      result = std::min(result, heaviest(split, layers, first, last));
      split.pop_back();
      return;
    }
    for (int count = 1; left - count >= pieces - 1 - std::ssize(split); ++count) {
      split.push_back(count);
      cut(left - count);
      split.pop_back();
    }
  };
  cut(static_cast<int>(layers.size()));
  return result;
}

TEST(LevelSplit, EqualLayersAreSplitEvenly) {
  const std::vector<double> layers(8, 1.0);
  EXPECT_EQ(level_split(layers, 0.0, 0.0, 4), (std::vector<int>{2, 2, 2, 2}));
  EXPECT_EQ(level_split(layers, 0.0, 0.0, 1), (std::vector<int>{8}));
  EXPECT_EQ(level_split(layers, 0.0, 0.0, 8), std::vector<int>(8, 1));
}

TEST(LevelSplit, TheHeadTakesRoomFromTheLastPiece) {
  const std::vector<double> layers(8, 1.0);
  EXPECT_EQ(level_split(layers, 0.0, 2.0, 2), (std::vector<int>{5, 3}));
  // A head heavier than all else leaves its piece one layer, and the others are level.
  EXPECT_EQ(level_split(layers, 0.0, 9.0, 3), (std::vector<int>{3, 4, 1}));
}

TEST(LevelSplit, IsAsGoodAsTheBestOfAllCuts) {
  std::uint64_t drawn = 0;
  const auto below = [&](std::uint64_t limit) { return random_bits(7, drawn++) % limit; };
  for (int draw = 0; draw < 300; ++draw) {
    std::vector<double> layers(1 + below(9));
    for (double& work : layers) work = 1.0 + static_cast<double>(below(9));
    const auto first = static_cast<double>(below(5));
    const auto last = static_cast<double>(below(12));
    const int pieces = 1 + static_cast<int>(below(layers.size()));
    const std::vector<int> split = level_split(layers, first, last, pieces);
    ASSERT_EQ(std::ssize(split), pieces);
    ASSERT_EQ(std::accumulate(split.begin(), split.end(), 0), std::ssize(layers));
    ASSERT_GE(*std::min_element(split.begin(), split.end()), 1);
    EXPECT_NEAR(heaviest(split, layers, first, last), least(layers, first, last, pieces), 1e-9);
  }
}

TEST(LevelSplit, MorePiecesThanLayersAreRefused) {
  EXPECT_THROW(static_cast<void>(level_split(std::vector<double>(2, 1.0), 0.0, 0.0, 3)),
               InvalidArgument);
}

}  // namespace
}  // namespace meshloom::plan::split
