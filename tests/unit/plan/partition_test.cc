#include "meshloom/plan/partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "meshloom/core/error.h"

namespace meshloom::plan {
namespace {

std::vector<double> sums(const std::vector<double>& costs, const Partition& parts) {
  std::vector<double> result;
  for (const auto& part : parts) {
    double sum = 0.0;
    for (const std::size_t index : part) sum += costs[index];
    result.push_back(sum);
  }
  std::sort(result.rbegin(), result.rend());
  return result;
}

const std::vector<double> kPublished = {8, 7, 6, 5, 4};

TEST(Partition, KarmarkarKarpGivesThePublishedSums) {
  const Partition parts = partition(kPublished, 2, PartitionMethod::kKarmarkarKarp);
  EXPECT_EQ(sums(kPublished, parts), (std::vector<double>{16, 14}));
}

TEST(Partition, EqualSizesDifferByAtMostOne) {
  for (const auto method : {PartitionMethod::kLongestFirst, PartitionMethod::kKarmarkarKarp}) {
    for (std::size_t count = 0; count < 40; ++count) {
      std::vector<double> costs(count);
      for (std::size_t i = 0; i < count; ++i) costs[i] = static_cast<double>((i * 37) % 23);
      const Partition parts = partition(costs, 4, method, true);
      std::vector<std::size_t> all;
      for (const auto& part : parts) {
        EXPECT_GE(part.size(), count / 4);
        EXPECT_LE(part.size(), (count + 3) / 4);
        all.insert(all.end(), part.begin(), part.end());
      }
      std::sort(all.begin(), all.end());
      std::vector<std::size_t> expected(count);
      std::iota(expected.begin(), expected.end(), std::size_t{0});
      EXPECT_EQ(all, expected);
    }
  }
}

TEST(Partition, GroupsKeepTheirCosts) {
  const std::vector<double> costs = {5, 1, 4, 2, 3, 9};
  const std::vector<int> groups = {0, 1, 0, 1, 0, 1};
  const Partition parts = partition_in_groups(costs, groups, 2, 2, PartitionMethod::kLongestFirst);
  EXPECT_EQ(parts, (Partition{{0}, {2, 4}, {5}, {1, 3}}));
}

TEST(Partition, RefusesBadInput) {
  EXPECT_THROW((void)partition(kPublished, 0, PartitionMethod::kLongestFirst), InvalidArgument);
  const std::vector<double> negative = {1, -1};
  EXPECT_THROW((void)partition(negative, 1, PartitionMethod::kLongestFirst), InvalidArgument);
  const std::vector<int> outside = {0, 2};
  const std::vector<double> two = {1, 1};
  EXPECT_THROW((void)partition_in_groups(two, outside, 2, 1, PartitionMethod::kLongestFirst),
               InvalidArgument);
}

}  // namespace
}  // namespace meshloom::plan
