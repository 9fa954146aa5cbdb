#include "meshloom/plan/expert_placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"

namespace meshloom::plan {
namespace {

TEST(ExpertPlacement, PublishedExampleComesOutExactly) {
  const PlacementProblem problem{.replicas = 16, .groups = 4, .nodes = 2, .ranks = 8};
  const std::vector<double> first{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86};
  const std::vector<double> second{20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27};
  EXPECT_EQ(place_experts(first, problem).expert,
            (std::vector<int>{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(place_experts(second, problem).expert,
            (std::vector<int>{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
}

TEST(ExpertPlacement, EveryExpertHasItsReplicasOnce) {
  for (int seed = 0; seed < 50; ++seed) {
    std::vector<double> loads;
    for (std::uint64_t e = 0; e < 24; ++e) {
      loads.push_back(random_uniform(static_cast<std::uint64_t>(seed), e) * 100.0);
    }
    for (const auto& problem :
         std::vector<PlacementProblem>{{.replicas = 24, .groups = 1, .nodes = 1, .ranks = 4},
                                       {.replicas = 24, .groups = 4, .nodes = 2, .ranks = 8},
                                       {.replicas = 40, .groups = 4, .nodes = 2, .ranks = 4},
                                       {.replicas = 32, .groups = 3, .nodes = 2, .ranks = 8}}) {
      const ExpertPlacement placed = place_experts(loads, problem);
      std::vector<std::vector<int>> replicas(loads.size());
      for (std::size_t p = 0; p < placed.expert.size(); ++p) {
        replicas.at(static_cast<std::size_t>(placed.expert[p])).push_back(placed.replica[p]);
      }
      for (std::size_t e = 0; e < replicas.size(); ++e) {
        std::sort(replicas[e].begin(), replicas[e].end());
        ASSERT_EQ(static_cast<int>(replicas[e].size()), placed.count[e]);
        for (int r = 0; r < placed.count[e]; ++r) {
          EXPECT_EQ(replicas[e][static_cast<std::size_t>(r)], r);
        }
      }
    }
  }
}

TEST(ExpertPlacement, HeavyExpertsAreSpreadOverRanks) {
  // Four heavy experts and four light ones on four ranks: one of each to a rank.
  const ExpertPlacement placed =
      place_experts(std::vector<double>{9, 8, 7, 6, 1, 2, 3, 4}, {.replicas = 8, .ranks = 4});
  for (std::size_t rank = 0; rank < 4; ++rank) {
    const int a = placed.expert[2 * rank];
    const int b = placed.expert[2 * rank + 1];
    EXPECT_LT(a, 4);
    EXPECT_EQ(b, a + 4);
  }
}

TEST(ExpertPlacement, SizesThatDoNotDivideAreNamed) {
  const std::vector<double> loads(6, 1.0);
  const auto message = [&](const PlacementProblem& problem) -> std::string {
    try {
      (void)place_experts(loads, problem);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return {};
  };
  EXPECT_NE(message({.replicas = 6, .groups = 4}).find("4 does not divide 6"), std::string::npos);
  EXPECT_NE(message({.replicas = 7, .ranks = 2}).find("2 does not divide 7"), std::string::npos);
  EXPECT_NE(message({.replicas = 6, .nodes = 2, .ranks = 3}).find("2 does not divide 3"),
            std::string::npos);
  EXPECT_NE(message({.replicas = 4}).find("4 places for 6 experts"), std::string::npos);
}

}  // namespace
}  // namespace meshloom::plan
