#include "meshloom/plan/rank_plan.h"

#include <gtest/gtest.h>

#include "meshloom/core/error.h"
#include "support.h"

namespace meshloom::plan {
namespace {

TEST(RankPlan, ListsWhatARankRunsInOrder) {
  const StepPlan plan = testing::hand_made_plan();
  const RankPlan mine = rank_plan(plan, 2);
  ASSERT_EQ(mine.units.size(), 2U);
  EXPECT_EQ(mine.units[0].slot, 0);
  EXPECT_EQ(mine.units[0].member, 0);
  EXPECT_EQ(mine.units[0].cu_seqlens, (std::vector<std::int64_t>{0, 300}));
  EXPECT_EQ(mine.units[0].local_cu_seqlens, (std::vector<std::int64_t>{0, 100}));
  EXPECT_EQ(mine.units[0].ranges[0][1], (TokenRange{250, 300}));
  EXPECT_EQ(mine.units[1].slot, 1);
  EXPECT_EQ(mine.units[1].member, 1);
  EXPECT_EQ(mine.units[1].samples, (std::vector<std::int64_t>{14}));
  const RankPlan packed = rank_plan(plan, 1);
  EXPECT_EQ(packed.units[0].cu_seqlens, (std::vector<std::int64_t>{0, 40, 100}));
  EXPECT_EQ(packed.units[0].local_cu_seqlens, packed.units[0].cu_seqlens);
  EXPECT_THROW((void)rank_plan(plan, 4), InvalidArgument);
}

TEST(RankPlan, SharesOfAllRanksAddUpToEverySample) {
  const StepPlan plan =
      make_plan(PlanProblem::from_lengths(testing::mixed_lengths(200, 7000, 1), {.hdp = 7}, 1000),
                "naive_hdp");
  std::map<std::int64_t, std::int64_t> held;
  for (int rank = 0; rank < 7; ++rank) {
    for (const auto& unit : rank_plan(plan, rank).units) {
      for (std::size_t d = 0; d < unit.samples.size(); ++d) {
        held[unit.samples[d]] += unit.local_cu_seqlens[d + 1] - unit.local_cu_seqlens[d];
      }
    }
  }
  for (const auto& sample : plan.samples) EXPECT_EQ(held[sample.id], sample.tokens);
}

TEST(PlacedUnits, FollowTheGlobalOrder) {
  const auto units = placed_units(testing::hand_made_plan());
  ASSERT_EQ(units.size(), 4U);
  EXPECT_EQ(units[2].slot, 1);
  EXPECT_EQ(units[2].index, 0);
  EXPECT_EQ(units[2].samples, (std::vector<std::int64_t>{14}));
  EXPECT_EQ(sample_ranks(testing::hand_made_plan()).at(10), (std::vector<int>{2, 0, 3}));
}

}  // namespace
}  // namespace meshloom::plan
