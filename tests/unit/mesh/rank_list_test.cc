#include "meshloom/mesh/rank_list.h"

#include <gtest/gtest.h>

namespace meshloom {
namespace {

TEST(RankList, ComparesByValueAndSharesItsBuffer) {
  const RankList a{3, 1, 2};
  const RankList copy = a;
  EXPECT_EQ(&copy.values(), &a.values());
  EXPECT_EQ(a, (RankList{3, 1, 2}));
  EXPECT_FALSE(a == (RankList{1, 2, 3}));
  EXPECT_EQ(a[0], 3);
  EXPECT_EQ(a.size(), 3U);
}

TEST(RankList, EmptyIsEmptyHoweverMade) {
  EXPECT_TRUE(RankList().empty());
  EXPECT_EQ(RankList(), RankList(std::vector<int>{}));
}

}  // namespace
}  // namespace meshloom
