#include "meshloom/plan/slicing.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdint>
#include <limits>

#include "meshloom/core/error.h"

namespace meshloom::plan {
namespace {

TEST(Slicing, WholeDocumentOnOneRank) {
  const auto two = member_ranges(17, 1, 0);
  EXPECT_EQ(two[0], (TokenRange{0, 17}));
  EXPECT_EQ(two[1].size(), 0);
}

TEST(Slicing, MemberTakesItsChunkAndTheMirroredOne) {
  // 13 tokens in 2 x 3 chunks: cuts at floor(13 k / 6) = 0 2 4 6 8 10 13.
  EXPECT_EQ(member_ranges(13, 3, 0), (std::array<TokenRange, 2>{{{0, 2}, {10, 13}}}));
  EXPECT_EQ(member_ranges(13, 3, 1), (std::array<TokenRange, 2>{{{2, 4}, {8, 10}}}));
  EXPECT_EQ(member_ranges(13, 3, 2), (std::array<TokenRange, 2>{{{4, 6}, {6, 8}}}));
}

TEST(Slicing, FewerTokensThanChunksLeavesSomeEmpty) {
  std::int64_t total = 0;
  for (int i = 0; i < 8; ++i) {
    const auto two = member_ranges(3, 8, i);
    total += two[0].size() + two[1].size();
  }
  EXPECT_EQ(total, 3);
}

TEST(Slicing, LargestLengthDoesNotOverflow) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  constexpr int kDegree = 1 << 24;
  EXPECT_EQ(chunk_range(kMost, kDegree, 2 * kDegree - 1).end, kMost);
  EXPECT_EQ(chunk_range(kMost, kDegree, 0).begin, 0);
  EXPECT_GT(chunk_range(kMost, kDegree, kDegree).begin, kMost / 2 - 2);
}

TEST(Slicing, BadArgumentIsRefused) {
  EXPECT_THROW((void)chunk_range(-1, 2, 0), InvalidArgument);
  EXPECT_THROW((void)chunk_range(4, 0, 0), InvalidArgument);
  EXPECT_THROW((void)chunk_range(4, 2, 4), InvalidArgument);
  EXPECT_THROW((void)chunk_range(4, 2, -1), InvalidArgument);
  EXPECT_THROW((void)member_ranges(4, 2, 2), InvalidArgument);
  EXPECT_THROW((void)member_ranges(4, std::numeric_limits<int>::max(), 0), InvalidArgument);
}

RC_GTEST_PROP(Slicing, ChunksTileTheDocumentEvenly, ()) {
  const auto tokens = *rc::gen::inRange<std::int64_t>(0, 3'000'000'000LL);
  const int degree = *rc::gen::inRange(1, 200);
  std::int64_t at = 0;
  for (int k = 0; k < 2 * degree; ++k) {
    const TokenRange range = chunk_range(tokens, degree, k);
    RC_ASSERT(range.begin == at);
    RC_ASSERT(range.begin == tokens * k / (2 * degree));
    RC_ASSERT(range.size() >= tokens / (2 * degree));
    RC_ASSERT(range.size() <= tokens / (2 * degree) + 1);
    at = range.end;
  }
  RC_ASSERT(at == tokens);
}

RC_GTEST_PROP(Slicing, MembersHoldTheSameNumberOfTokensGiveOrTakeTwo, ()) {
  const auto tokens = *rc::gen::inRange<std::int64_t>(1, 100'000);
  const int degree = *rc::gen::inRange(1, 130);
  std::int64_t total = 0;
  for (int i = 0; i < degree; ++i) {
    const auto two = member_ranges(tokens, degree, i);
    const std::int64_t held = two[0].size() + two[1].size();
    RC_ASSERT(held <= tokens / degree + 2);
    RC_ASSERT(held + 2 >= tokens / degree);
    total += held;
  }
  RC_ASSERT(total == tokens);
}

}  // namespace
}  // namespace meshloom::plan
