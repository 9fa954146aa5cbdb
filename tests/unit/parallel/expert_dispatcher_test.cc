#include "meshloom/parallel/expert_dispatcher.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/parallel/groups.h"

namespace meshloom::parallel {
namespace {

constexpr std::int64_t kRowWidth = 5;

at::Tensor numbers(std::vector<std::int64_t> shape, std::uint64_t seed) {
  at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(at::kDouble));
  double* data = tensor.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    data[i] = random_normal(seed, static_cast<std::uint64_t>(i));
  }
  return tensor;
}

/// k different experts of each token.
at::Tensor choices(std::int64_t tokens, std::int64_t k, std::int64_t experts, std::uint64_t seed) {
  at::Tensor chosen = at::empty({tokens, k}, at::TensorOptions().dtype(at::kLong));
  auto* data = chosen.mutable_data_ptr<std::int64_t>();
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto first = static_cast<std::int64_t>(random_bits(seed, static_cast<std::uint64_t>(t)) %
                                                 static_cast<std::uint64_t>(experts));
    for (std::int64_t j = 0; j < k; ++j) data[t * k + j] = (first + j * j + j) % experts;
  }
  return chosen;
}

/// What an expert does to its rows, by hand: another factor for each expert.
at::Tensor experts_applied(const at::Tensor& rows, const std::vector<std::int64_t>& counts,
                           std::span<const std::int64_t> held) {
  at::Tensor result = rows.clone();
  std::int64_t begin = 0;
  for (std::size_t e = 0; e < held.size(); ++e) {
    result.narrow(0, begin, counts[e]).mul_(1.0 + 0.37 * static_cast<double>(held[e]));
    begin += counts[e];
  }
  EXPECT_EQ(begin, rows.size(0));
  return result;
}

struct Passed {
  at::Tensor out, dx, dweights;
};

/// The layer that the tests dispatch to; none before it has experts.
constexpr std::int64_t kLayer = 1;

std::vector<ExpertMap> maps_of(const ExpertMap& map) { return {ExpertMap::even(0, 1), map}; }

Passed pass_through(model::TokenDispatcher& dispatcher, std::span<const std::int64_t> held,
                    std::int64_t experts, const at::Tensor& x, const at::Tensor& chosen,
                    const at::Tensor& weights, const at::Tensor& dout) {
  // Other work may come between the start and the arrival.
  const auto rows_arrive = dispatcher.begin_dispatch(x, chosen, {kLayer, experts});
  const at::Tensor meanwhile = x.matmul(x.t());
  const auto tokens = rows_arrive();
  EXPECT_EQ(tokens.expert_rows.size(), held.size());
  Passed result;
  result.out =
      dispatcher.combine(experts_applied(tokens.rows, tokens.expert_rows, held), tokens, weights);
  const auto gradients_arrive = dispatcher.begin_combine_backward(dout, tokens, weights);
  EXPECT_TRUE(at::equal(meanwhile, x.matmul(x.t())));
  const auto combined = gradients_arrive();
  const auto back = experts_applied(combined.rows, tokens.expert_rows, held);
  const auto dweights = back.mul(tokens.rows).sum(1);
  const auto gradients = dispatcher.dispatch_backward(back.mul(combined.weights.unsqueeze(1)),
                                                      dweights, tokens, x.size(0), chosen.size(1));
  result.dx = gradients.x;
  result.dweights = gradients.weights;
  return result;
}

/// Every member's share comes back as one rank that holds all experts computes it, bit for bit.
void check_map(const ExpertMap& map, const std::vector<std::int64_t>& tokens, std::int64_t k) {
  std::vector<std::int64_t> all;
  for (std::int64_t e = 0; e < map.experts(); ++e) all.push_back(e);
  const std::vector<ExpertMap> maps = maps_of(map);
  comm::run_thread_ranks(map.ranks(), [&](comm::Communicator group) {
    const auto rank = static_cast<std::uint64_t>(group.rank());
    const std::int64_t count = tokens[rank];
    const at::Tensor x = numbers({count, kRowWidth}, 10 + rank);
    const at::Tensor chosen = choices(count, k, map.experts(), 20 + rank);
    const at::Tensor weights = numbers({count, k}, 30 + rank);
    const at::Tensor dout = numbers({count, kRowWidth}, 40 + rank);
    model::LocalDispatcher local;
    const Passed expected = pass_through(local, all, map.experts(), x, chosen, weights, dout);
    ExpertDispatcher dispatcher(group, maps);
    const Passed given = pass_through(dispatcher, map.experts_of(group.rank()), map.experts(), x,
                                      chosen, weights, dout);
    EXPECT_TRUE(at::equal(given.out, expected.out)) << "rank " << rank;
    EXPECT_TRUE(at::equal(given.dx, expected.dx)) << "rank " << rank;
    EXPECT_TRUE(at::equal(given.dweights, expected.dweights)) << "rank " << rank;
  });
}

TEST(ExpertMap, EvenSharesDifferByAtMostOne) {
  for (const std::int64_t experts : {0, 1, 3, 4, 6, 7, 128}) {
    for (const int ranks : {1, 2, 3, 4, 8}) {
      const ExpertMap map = ExpertMap::even(experts, ranks);
      std::int64_t held = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const auto own = map.experts_of(rank);
        const auto size = static_cast<std::int64_t>(own.size());
        EXPECT_GE(size, experts / ranks);
        EXPECT_LE(size, (experts + ranks - 1) / ranks);
        for (const std::int64_t expert : own) {
          EXPECT_EQ(expert, held++);
          EXPECT_EQ(map.owner(expert), rank);
        }
      }
      EXPECT_EQ(held, experts);
    }
  }
}

TEST(ExpertMap, RefusesAnOwnerOutsideTheGroup) {
  try {
    const ExpertMap map({0, 1, 2}, 2);
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("expert 2 is on member 2"), std::string::npos);
  }
}

TEST(ExpertMap, RearrangedPlacesHoldAnyOrder) {
  const ExpertMap even = ExpertMap::even(5, 2);  // 2 and 3
  const ExpertMap map = even.rearranged({4, 0, 3, 1, 2});
  EXPECT_EQ(map.places(), (std::vector<std::int64_t>{1, 3, 4, 2, 0}));
  EXPECT_EQ(map.owner(4), 0);
  EXPECT_EQ(map.owner(3), 1);
  EXPECT_EQ(map.experts_of(0)[0], 4);
  EXPECT_EQ(map.experts_of(1).size(), 3U);
  EXPECT_TRUE(map.same_numbers(even));
  EXPECT_FALSE(map == even);
  EXPECT_EQ(map.rearranged({0, 1, 2, 3, 4}), even);
  EXPECT_FALSE(ExpertMap({1, 0, 0, 0, 1}, 2).same_numbers(even));
  EXPECT_THROW((void)even.rearranged({0, 1, 2, 3}), InvalidArgument);
  EXPECT_THROW((void)even.rearranged({0, 1, 2, 3, 3}), InvalidArgument);
  EXPECT_THROW((void)even.rearranged({0, 1, 2, 3, 5}), InvalidArgument);
}

TEST(ExpertDispatcher, EqualsOneRankThatHoldsAllExperts) {
  check_map(ExpertMap::even(4, 1), {7}, 2);
  check_map(ExpertMap::even(4, 2), {7, 30}, 2);
  check_map(ExpertMap::even(8, 4), {1, 17, 40, 3}, 3);
  check_map(ExpertMap::even(8, 8), {5, 6, 7, 8, 9, 1, 2, 3}, 1);
}

TEST(ExpertDispatcher, SharesExpertsThatDoNotDivide) {
  check_map(ExpertMap::even(5, 2), {11, 4}, 2);
  check_map(ExpertMap::even(6, 4), {3, 9, 5, 14}, 2);
  // Some members have no expert at all.
  check_map(ExpertMap::even(3, 8), {2, 3, 4, 5, 6, 7, 8, 9}, 2);
}

TEST(ExpertDispatcher, RanksWithoutTokensStayInStep) {
  check_map(ExpertMap::even(4, 2), {0, 12}, 2);
  check_map(ExpertMap::even(4, 4), {0, 0, 6, 0}, 2);
  check_map(ExpertMap::even(4, 4), {0, 0, 0, 0}, 2);
}

TEST(ExpertDispatcher, FollowsAnyMap) {
  check_map(ExpertMap({1, 0, 1, 1, 0, 0}, 2), {13, 8}, 2);
  check_map(ExpertMap({3, 3, 0, 2, 0, 3, 0}, 4), {5, 1, 0, 21}, 3);
  check_map(ExpertMap::even(6, 2).rearranged({4, 0, 3, 1, 5, 2}), {13, 8}, 2);
}

TEST(ExpertDispatcher, RowsArriveSortedByExpertThenSender) {
  const std::vector<ExpertMap> maps = maps_of(ExpertMap::even(4, 2));
  comm::run_thread_ranks(2, [&](comm::Communicator group) {
    // Row t of rank r is 100 r + t, and goes to experts t mod 4 and (t + 2) mod 4.
    const std::int64_t count = 6;
    at::Tensor x = at::empty({count, 1}, at::TensorOptions().dtype(at::kDouble));
    at::Tensor chosen = at::empty({count, 2}, at::TensorOptions().dtype(at::kLong));
    for (std::int64_t t = 0; t < count; ++t) {
      x[t].fill_(static_cast<double>(100 * group.rank() + t));
      chosen[t][0].fill_(t % 4);
      chosen[t][1].fill_((t + 2) % 4);
    }
    ExpertDispatcher dispatcher(group, maps);
    const auto tokens = dispatcher.dispatch(x, chosen, {kLayer, 4});
    EXPECT_EQ(tokens.expert_rows, (std::vector<std::int64_t>{6, 6}));
    const std::vector<double> even{0, 2, 4, 100, 102, 104};
    const std::vector<double> odd{1, 3, 5, 101, 103, 105};
    // Experts 0 and 2 get the even rows, 1 and 3 the odd ones.
    for (std::int64_t i = 0; i < 6; ++i) {
      const auto at = static_cast<std::size_t>(i);
      EXPECT_EQ(tokens.rows[i].item<double>(), even[at]);
      EXPECT_EQ(tokens.rows[6 + i].item<double>(), odd[at]);
    }
    EXPECT_TRUE(dispatcher.keeps_rows());
    EXPECT_THROW((void)dispatcher.rows_again(x, tokens, 2), NotSupported);
    EXPECT_THROW((void)dispatcher.dispatch(x, chosen, {kLayer, 5}), InvalidArgument);
  });
}

TEST(ExpertDispatcher, TrafficIsTheClosedForm) {
  const ExpertMap map = ExpertMap::even(5, 3);
  const std::vector<ExpertMap> maps = maps_of(map);
  const std::int64_t k = 2;
  const std::vector<std::int64_t> tokens{12, 0, 31};
  std::atomic<std::int64_t> payload{0};
  std::atomic<std::int64_t> sizes{0};
  std::atomic<std::int64_t> expected{0};
  comm::run_thread_ranks(3, [&](comm::Communicator group) {
    const auto rank = static_cast<std::uint64_t>(group.rank());
    const std::int64_t count = tokens[rank];
    const at::Tensor chosen = choices(count, k, map.experts(), rank);
    std::int64_t away = 0;
    for (std::int64_t i = 0; i < chosen.numel(); ++i) {
      away += map.owner(chosen.const_data_ptr<std::int64_t>()[i]) != group.rank();
    }
    ExpertDispatcher dispatcher(group, maps);
    (void)pass_through(dispatcher, map.experts_of(group.rank()), map.experts(),
                       numbers({count, kRowWidth}, rank), chosen, numbers({count, k}, rank),
                       numbers({count, kRowWidth}, rank));
    constexpr std::int64_t kBytes = 8;  // of an element and of a routing weight
    expected += away * (2 * kRowWidth * kBytes + 2 * (kRowWidth * kBytes + kBytes));
    payload += group.traffic().at("dispatch").sent_bytes;
    sizes += group.traffic().at("dispatch_sizes").sent_bytes;
  });
  EXPECT_EQ(payload, expected);
  EXPECT_EQ(sizes, 8 * map.experts() * (map.ranks() - 1));
}

TEST(ExpertParallel, GroupsAreNeighboursAndReplicasHoldTheSame) {
  const auto config = model::ModelConfig::from_json(sweep::kMixtral);  // five experts
  comm::run_thread_ranks(8, [&](comm::Communicator hdp) {
    Groups groups(hdp, place_model(config, {.hdp = 8, .ep = 4}));
    ASSERT_TRUE(groups.experts());
    EXPECT_EQ(groups.experts()->size(), 4);
    EXPECT_EQ(groups.experts()->rank(), hdp.rank() % 4);
    EXPECT_EQ(groups.replicas(ReplicaSet::kExpert).size(), 2);
    EXPECT_EQ(groups.replicas(ReplicaSet::kExpert).position(), hdp.rank() / 4);
    EXPECT_FALSE(Groups(hdp, place_model(config, {.hdp = 8})).experts());
    EXPECT_THROW(Groups(hdp, place_model(config, {.hdp = 4, .ep = 2})), InvalidArgument);
  });
}

}  // namespace
}  // namespace meshloom::parallel
