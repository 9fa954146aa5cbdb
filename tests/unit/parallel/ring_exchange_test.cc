#include "meshloom/parallel/ring_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/parallel/sample_batch.h"

namespace meshloom::parallel {
namespace {

// fp64 sums over at most some hundred keys, merged in another order.
constexpr double kFp64Tolerance = 1e-12;

at::Tensor random_tensor(std::vector<std::int64_t> shape, std::uint64_t seed) {
  auto tensor = at::empty(shape, at::TensorOptions().dtype(at::kDouble));
  auto* data = tensor.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    data[i] = random_normal(seed, static_cast<std::uint64_t>(i));
  }
  return tensor;
}

plan::StepPlan plan_of(const std::vector<std::int64_t>& lengths, std::vector<int> ranks) {
  plan::StepPlan plan;
  plan::Unit unit{.ranks = std::move(ranks), .samples = {}, .exchange = plan::Exchange::kRing};
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const auto id = static_cast<std::int64_t>(i);
    plan.samples.push_back({.id = id, .tokens = lengths[i], .loss_tokens = lengths[i] - 1});
    unit.samples.push_back(id);
  }
  plan.slots = {{.units = {unit}}};
  return plan;
}

/// Tokens are their row in the concatenated documents, so that slices can be gathered.
SampleLoader row_numbers(const std::vector<std::int64_t>& lengths) {
  return [lengths](std::int64_t id) {
    const auto begin = std::accumulate(lengths.begin(), lengths.begin() + id, std::int64_t{0});
    SampleTokens result;
    for (std::int64_t t = 0; t < lengths[static_cast<std::size_t>(id)]; ++t) {
      result.tokens.push_back(static_cast<std::int32_t>(begin + t));
    }
    return result;
  };
}

double worst(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0) return 0.0;
  // With a window of one token the gradients of q and k are zero: a floor keeps the ratio defined.
  constexpr double kFloor = 1e-3;
  return a.sub(b).abs().max().item<double>() / std::max(kFloor, b.abs().max().item<double>());
}

struct Case {
  int ranks;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t window;
  std::vector<std::int64_t> lengths;
};

void check(const Case& c) {
  const std::int64_t dim = 8;
  const auto total = std::accumulate(c.lengths.begin(), c.lengths.end(), std::int64_t{0});
  const auto q = random_tensor({total, c.heads, dim}, 1);
  const auto k = random_tensor({total, c.kv_heads, dim}, 2);
  const auto v = random_tensor({total, c.kv_heads, dim}, 3);
  const auto dout = random_tensor({total, c.heads, dim}, 4);
  const model::AttentionOptions options{.scale = 0.35, .window = c.window};

  const auto whole_plan = plan_of(c.lengths, {0});
  const auto whole =
      build_batch(whole_plan, whole_plan.slots[0].units[0], 0, row_numbers(c.lengths), at::kCPU);
  model::LocalAttention local;
  const auto expected = local.forward(q, k, v, whole, options);
  const auto expected_gradients = local.backward(dout, q, k, v, expected, whole, options);

  // The unit sits anywhere on a larger axis, in any order.
  const int world = c.ranks + 1;
  std::vector<int> ranks;
  for (int i = 0; i < c.ranks; ++i) ranks.push_back((i * 2 + 1) % world);
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  std::reverse(ranks.begin(), ranks.end());
  const auto plan = plan_of(c.lengths, ranks);

  comm::run_thread_ranks(world, [&](comm::Communicator hdp) {
    const auto own = std::find(ranks.begin(), ranks.end(), hdp.rank());
    if (own == ranks.end()) return;
    const auto batch =
        build_batch(plan, plan.slots[0].units[0], static_cast<int>(own - ranks.begin()),
                    row_numbers(c.lengths), at::kCPU);
    const auto rows = batch.tokens;
    const auto pick = [&](const at::Tensor& x) { return x.index_select(0, rows); };
    RingExchange ring(hdp, ranks);
    const auto out = ring.forward(pick(q), pick(k), pick(v), batch, options);
    EXPECT_LE(worst(out.out, pick(expected.out)), kFp64Tolerance);
    const auto gradients =
        ring.backward(pick(dout), pick(q), pick(k), pick(v), out, batch, options);
    EXPECT_LE(worst(gradients.dq, pick(expected_gradients.dq)), kFp64Tolerance);
    EXPECT_LE(worst(gradients.dk, pick(expected_gradients.dk)), kFp64Tolerance);
    EXPECT_LE(worst(gradients.dv, pick(expected_gradients.dv)), kFp64Tolerance);
  });
}

TEST(RingExchange, EqualsLocalAttentionOnAnyNumberOfRanks) {
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    SCOPED_TRACE(ranks);
    check({.ranks = ranks,
           .heads = 4,
           .kv_heads = 2,
           .window = 0,
           .lengths = {1, 97, 3, 16 * ranks, 2 * ranks, 13}});
  }
}

TEST(RingExchange, CarriesOddHeadCounts) {
  check({.ranks = 3, .heads = 7, .kv_heads = 1, .window = 0, .lengths = {41, 5}});
  check({.ranks = 3, .heads = 8, .kv_heads = 8, .window = 0, .lengths = {41, 5}});
  check({.ranks = 4, .heads = 3, .kv_heads = 1, .window = 0, .lengths = {64}});
}

TEST(RingExchange, RespectsSlidingWindows) {
  for (const std::int64_t window : {1, 2, 7, 33, 1000}) {
    SCOPED_TRACE(window);
    check({.ranks = 3, .heads = 4, .kv_heads = 2, .window = window, .lengths = {50, 2, 101}});
  }
}

TEST(RingExchange, RefusesAUnitWithoutThisRank) {
  auto world = comm::make_thread_world(2);
  EXPECT_THROW(RingExchange(world[0], {1}), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::parallel
