#include "meshloom/parallel/replicas.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/parallel/groups.h"

namespace meshloom::parallel::replicas {
namespace {

std::vector<int> first_ranks(int count) {
  std::vector<int> ranks(static_cast<std::size_t>(count));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

TEST(Replicas, AreOrderedByTheirPlaceInsideANode) {
  const ReplicaOrder even = order_replicas(first_ranks(6), 3);
  EXPECT_EQ(even.nodes, 2);
  EXPECT_EQ(even.ranks, (std::vector<int>{0, 3, 1, 4, 2, 5}));
  const ReplicaOrder sparse = order_replicas({0, 2, 4, 6}, 4);
  EXPECT_EQ(sparse.nodes, 2);
  EXPECT_EQ(sparse.ranks, (std::vector<int>{0, 4, 2, 6}));
  for (const int alone : {0, 1, 4, 6}) {  // no nodes, one rank each, unequal, one node
    const ReplicaOrder order = order_replicas(first_ranks(6), alone);
    EXPECT_EQ(order.nodes, 1) << alone;
    EXPECT_EQ(order.ranks, first_ranks(6)) << alone;
  }
}

TEST(Replicas, OwnersCoverTheElementsOnce) {
  for (const std::int64_t elements : {0, 1, 7, 64}) {
    std::int64_t end = 0;
    for (int position = 0; position < 6; ++position) {
      const FlatRange range = owned_range(elements, position, 6);
      EXPECT_EQ(range.begin, end);
      EXPECT_LE(range.size(), elements / 6 + 1);
      end = range.end;
    }
    EXPECT_EQ(end, elements);
  }
}

/// Many operations under way, of which some ranks look at others' ends early and some late.
TEST(Replicas, TwoLevelsSumAndGatherLikeOne) {
  comm::run_thread_ranks(8, [](comm::Communicator world) {
    const model::ModelConfig config = model::ModelConfig::from_json(sweep::kDense);
    ModelPlacement placement = place_model(config, {.hdp = 8});
    placement.ranks_per_node = 2;
    Groups groups(world, placement);
    Replicas replicas = groups.replicas(ReplicaSet::kDense);
    ASSERT_EQ(replicas.groups().size(), 4);
    ASSERT_EQ(replicas.size(), 8);
    const std::vector<int> order = placement.replicas(ReplicaSet::kDense, world.rank()).ranks;
    ASSERT_EQ(order[static_cast<std::size_t>(replicas.position())], world.rank());
    std::vector<ReplicaWork> sums;
    std::vector<ReplicaWork> gatherings;
    constexpr std::int64_t kCalls = 12;
    const auto values = [](std::int64_t call) {
      return at::arange(5 * call, at::TensorOptions().dtype(at::kDouble)) + call;
    };
    const auto own = [&](std::int64_t call) {
      const FlatRange range = owned_range(5 * call, replicas.position(), 8);
      return values(call).narrow(0, range.begin, range.size()).contiguous();
    };
    for (std::int64_t call = 0; call < kCalls; ++call) {
      sums.push_back(replicas.reduce_scatter(values(call) * (world.rank() + 1)));
      gatherings.push_back(replicas.all_gather(own(call), 5 * call));
      for (int look = 0; look < world.rank() * call; ++look) replicas.advance();
    }
    for (std::int64_t call = 0; call < kCalls; ++call) {
      // The last first, so that the others' second halves start for it.
      const auto at = static_cast<std::size_t>(kCalls - 1 - call);
      EXPECT_TRUE(at::equal(gatherings[at].result(), values(kCalls - 1 - call)));
      EXPECT_TRUE(at::equal(sums[at].result(), own(kCalls - 1 - call) * 36));
    }
  });
}

}  // namespace
}  // namespace meshloom::parallel::replicas
