#include "train/internal/stragglers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/random.h"

namespace meshloom::train::detail {
namespace {

/// Work of four ranks in cost units, and the seconds that one of them takes.
constexpr double kPace = 2e-3;
/// Planted slowness.
constexpr double kFactor = 1.8;
/// Planted scatter of times, both ways.
constexpr double kScatter = 0.15;

class Cluster {
 public:
  explicit Cluster(std::size_t size) : slow(size, 1.0), load(size, 0.0), share(size, 1.0) {}

  /// Runs steps of scattered times in which all wait for the last.
  StepBlame run(StragglerWatch& watch, int steps) {
    StepBlame blame;
    for (int i = 0; i < steps; ++i, ++step_) {
      ranks.assign(slow.size(), {});
      double longest = 0.0;
      for (std::size_t r = 0; r < ranks.size(); ++r) {
        const double noise =
            random_uniform(random_key("scatter", r), static_cast<std::uint64_t>(step_));
        ranks[r].planned = 100.0 * share[r];
        ranks[r].busy = ranks[r].planned * kPace * slow[r] * (1.0 + kScatter * (2.0 * noise - 1.0));
        ranks[r].load = load[r];
        longest = std::max(longest, ranks[r].busy + ranks[r].load);
      }
      for (RankTimes& rank : ranks) rank.exposed = 0.01 + longest - rank.busy - rank.load;
      blame = watch.add(step_, longest + 0.01, ranks);
      for (const std::string& text : watch.take_notices()) notices.push_back(text);
    }
    return blame;
  }

  std::vector<double> slow;
  std::vector<double> load;
  std::vector<double> share;
  std::vector<RankTimes> ranks;
  std::vector<std::string> notices;

 private:
  std::int64_t step_ = 0;
};

TEST(StragglerWatch, EqualRanksAreNotBlamed) {
  Cluster cluster(4);
  StragglerWatch watch;
  cluster.run(watch, 40);
  EXPECT_TRUE(cluster.notices.empty()) << cluster.notices[0];
}

TEST(StragglerWatch, SlowHardwareIsNamedOnceAndAgainAfterItWasFine) {
  Cluster cluster(4);
  StragglerWatch watch;
  cluster.slow[2] = kFactor;
  const StepBlame blame = cluster.run(watch, 20);
  EXPECT_EQ(blame.slowest, 2);
  EXPECT_GT(blame.hardware_seconds, 0.5 * (kFactor - 1.0) * 100.0 * kPace);
  EXPECT_NEAR(blame.data_seconds, 0.0, 1e-12);
  EXPECT_GT(blame.waiting_seconds, 0.3 * (kFactor - 1.0) * 100.0 * kPace);
  ASSERT_EQ(cluster.notices.size(), 1U);
  EXPECT_NE(cluster.notices[0].find("rank 2 took 1."), std::string::npos) << cluster.notices[0];
  EXPECT_NE(cluster.notices[0].find("slow hardware"), std::string::npos) << cluster.notices[0];
  EXPECT_EQ(cluster.notices[0].find("steps 0 to 7"), 0U) << cluster.notices[0];
  cluster.slow[2] = 1.0;
  cluster.run(watch, 20);
  EXPECT_EQ(cluster.notices.size(), 1U);
  cluster.slow[2] = kFactor;
  cluster.run(watch, 20);
  EXPECT_EQ(cluster.notices.size(), 2U);
}

TEST(StragglerWatch, TheFasterOfTwoRanksIsTheMeasure) {
  Cluster cluster(2);
  StragglerWatch watch;
  cluster.slow[0] = kFactor;
  EXPECT_EQ(cluster.run(watch, 20).slowest, 0);
  ASSERT_EQ(cluster.notices.size(), 1U);
  EXPECT_NE(cluster.notices[0].find("rank 0 took"), std::string::npos) << cluster.notices[0];
}

TEST(StragglerWatch, AFewSlowStepsAreNoHabit) {
  Cluster cluster(4);
  StragglerWatch watch;
  for (int round = 0; round < 5; ++round) {
    cluster.slow[1] = 10.0;
    cluster.run(watch, 3);
    cluster.slow[1] = 1.0;
    cluster.run(watch, 5);
  }
  EXPECT_TRUE(cluster.notices.empty()) << cluster.notices[0];
}

TEST(StragglerWatch, MoreWorkIsSlowDataAndNotHardware) {
  Cluster cluster(4);
  StragglerWatch watch;
  cluster.share = {1.0, 3.0, 1.0, 1.0};
  const StepBlame blame = cluster.run(watch, 20);
  EXPECT_EQ(blame.slowest, 1);
  EXPECT_GT(blame.data_seconds, 1.0 * 100.0 * kPace);
  EXPECT_LT(blame.hardware_seconds, 0.5 * blame.data_seconds);
  // What it did for its work is what the middle rank would have taken.
  EXPECT_NEAR(cluster.ranks[1].planned, 3.0 * cluster.ranks[0].planned, 1e-9);
  ASSERT_EQ(cluster.notices.size(), 1U);
  EXPECT_NE(cluster.notices[0].find("rank 1 was the slowest because its plans held 2.00 times"),
            std::string::npos)
      << cluster.notices[0];
}

TEST(StragglerWatch, SlowLoadingIsToldApart) {
  Cluster cluster(3);
  StragglerWatch watch;
  cluster.load[0] = 0.3;
  const StepBlame blame = cluster.run(watch, 20);
  EXPECT_GT(blame.waiting_seconds, 0.1);
  ASSERT_EQ(cluster.notices.size(), 1U);
  EXPECT_NE(cluster.notices[0].find("rank 0 spent 0.3 s of a step of"), std::string::npos)
      << cluster.notices[0];
}

TEST(StragglerWatch, RanksWithoutWorkAreNoMeasure) {
  StragglerWatch watch;
  for (int step = 0; step < 20; ++step) {
    std::vector<RankTimes> ranks(3);
    ranks[0] = {.planned = 100.0, .busy = 0.2, .load = 0.0, .exposed = 0.0};
    const StepBlame blame = watch.add(step, 0.2, ranks);
    EXPECT_EQ(blame.slowest, 0);
    EXPECT_NEAR(blame.hardware_seconds, 0.0, 1e-12);
  }
  std::vector<RankTimes> none(3);
  EXPECT_EQ(watch.add(20, 0.1, none).slowest, -1);
}

TEST(StragglerWatch, OneRankHasNobodyToCompareWith) {
  StragglerWatch watch;
  std::vector<RankTimes> ranks(1);
  ranks[0] = {.planned = 100.0, .busy = 0.2, .load = 0.0, .exposed = 0.0};
  EXPECT_EQ(watch.add(0, 0.2, ranks).slowest, -1);
  EXPECT_NEAR(ranks[0].planned, 0.2, 1e-12);
}

}  // namespace
}  // namespace meshloom::train::detail
