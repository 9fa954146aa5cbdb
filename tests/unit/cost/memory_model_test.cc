#include "meshloom/cost/memory_model.h"

#include <gtest/gtest.h>

#include <limits>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

constexpr std::int64_t kKilo = 1024;

// 32 layers, 8K tokens a rank: the published table of ranks that a sequence needs by offload ratio.
TEST(MemoryModel, OffloadTableComesOut) {
  const MemoryModel memory{.layers = 32, .resident_layers = 2};
  const double ratios[] = {0.0, 0.5, 0.75, 1.0};
  const int of_1m[] = {128, 68, 38, 8};
  const int of_2m[] = {256, 136, 76, 16};
  const int of_312k[] = {39, 21, 12, 3};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(memory.degree_needed(8 * kKilo, ratios[i], kKilo * kKilo, 1024), of_1m[i]);
    EXPECT_EQ(memory.degree_needed(8 * kKilo, ratios[i], 2 * kKilo * kKilo, 1024), of_2m[i]);
    EXPECT_EQ(memory.degree_needed(8 * kKilo, ratios[i], 312 * kKilo, 1024), of_312k[i]);
  }
}

TEST(MemoryModel, LongSampleNeedsNinetySixRanks) {
  EXPECT_EQ(MemoryModel{}.degree_needed(8 * kKilo, 0.0, 768 * kKilo, 128), 96);
  EXPECT_EQ(MemoryModel{}.degree_needed(8 * kKilo, 0.0, 768 * kKilo, 95), std::nullopt);
}

TEST(MemoryModel, NoLayersMeansNoOffload) {
  const MemoryModel memory;
  EXPECT_EQ(memory.resident_fraction(1.0), 1.0);
  EXPECT_EQ(memory.unit_capacity(100, 3, 1.0), 300);
  EXPECT_EQ(memory.offload_needed(100, 3, 300), 0.0);
  EXPECT_EQ(memory.offload_needed(100, 3, 301), std::nullopt);
}

TEST(MemoryModel, OffloadNeededIsTheSmallestThatHolds) {
  const MemoryModel memory{.layers = 32, .resident_layers = 2};
  EXPECT_EQ(memory.offload_needed(8 * kKilo, 68, kKilo * kKilo), 0.5);
  EXPECT_EQ(memory.offload_needed(8 * kKilo, 38, kKilo * kKilo), 0.75);
  EXPECT_EQ(memory.offload_needed(8 * kKilo, 8, kKilo * kKilo), 1.0);
  EXPECT_EQ(memory.offload_needed(8 * kKilo, 7, kKilo * kKilo), std::nullopt);
  for (int degree = 8; degree < 128; ++degree) {
    const auto ratio = memory.offload_needed(8 * kKilo, degree, kKilo * kKilo);
    ASSERT_TRUE(ratio.has_value());
    EXPECT_GE(memory.unit_capacity(8 * kKilo, degree, *ratio), kKilo * kKilo);
    EXPECT_LT(memory.unit_capacity(8 * kKilo, degree, *ratio - 1.0 / 1024), kKilo * kKilo);
  }
}

TEST(MemoryModel, HugeNumbersSaturate) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(MemoryModel{}.unit_capacity(kMost, 2, 0.0), kMost);
  const MemoryModel none_resident{.layers = 4, .resident_layers = 0};
  EXPECT_EQ(none_resident.unit_capacity(10, 1, 1.0), kMost);
  EXPECT_EQ(MemoryModel{}.unit_capacity(0, 2, 0.0), 0);
}

TEST(MemoryModel, NegativeCountsAreRefused) {
  EXPECT_THROW((MemoryModel{.layers = -1}.validate()), InvalidArgument);
  EXPECT_THROW((MemoryModel{.layers = 4, .resident_layers = -1}.validate()), InvalidArgument);
}

TEST(MemoryModel, OffloadIsHiddenAsFarAsTheForwardIsLongEnough) {
  const CostModel cost{.quadratic = 3.0, .linear = 300.0, .fixed = 0.0, .exchange = 0.0};
  const MemoryModel memory{.layers = 32, .resident_layers = 2, .transfer = 400.0};
  // A third of (3 s + 300) a token, against 400.
  EXPECT_DOUBLE_EQ(memory.most_hidden(cost, 100), 200.0 / 400.0);
  EXPECT_DOUBLE_EQ(memory.most_hidden(cost, 300), 1.0);
  EXPECT_DOUBLE_EQ(memory.most_hidden(cost, 3000), 1.0);
  EXPECT_DOUBLE_EQ((MemoryModel{.layers = 32}).most_hidden(cost, 1), 1.0);
  EXPECT_THROW((MemoryModel{.layers = 32, .transfer = -1.0}).validate(), InvalidArgument);
}

}  // namespace
}  // namespace meshloom
