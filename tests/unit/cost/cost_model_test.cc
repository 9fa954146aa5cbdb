#include "meshloom/cost/cost_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

TEST(CostModel, WorkAndTimeFollowTheFormula) {
  const CostModel cost{.quadratic = 2, .linear = 3, .fixed = 5, .exchange = 7};
  EXPECT_DOUBLE_EQ(cost.work(10), 2 * 100 + 3 * 10);
  EXPECT_DOUBLE_EQ(cost.unit_time(230, 10, 1), 230 + 5);
  EXPECT_DOUBLE_EQ(cost.unit_time(230, 10, 4), 230.0 / 4 + 5 + 7 * 0.75 * 10);
}

// Splitting 100 tokens 30 / 70 rather than 50 / 50 costs 1.16 times the quadratic work.
TEST(CostModel, UnevenSplitCostsMore) {
  const CostModel cost{.quadratic = 1, .linear = 0};
  EXPECT_DOUBLE_EQ((cost.work(30) + cost.work(70)) / (2 * cost.work(50)), 1.16);
}

TEST(CostModel, BadCoefficientIsNamed) {
  const double kInfinity = std::numeric_limits<double>::infinity();
  for (const auto& bad : {CostModel{.quadratic = -1}, CostModel{.linear = std::nan("")},
                          CostModel{.fixed = kInfinity}, CostModel{.exchange = -0.5},
                          CostModel{.quadratic = 0, .linear = 0}}) {
    EXPECT_THROW(bad.validate(), InvalidArgument);
  }
  try {
    CostModel{.fixed = -2}.validate();
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("fixed is -2"), std::string::npos);
  }
  EXPECT_NO_THROW(CostModel{}.validate());
}

}  // namespace
}  // namespace meshloom
