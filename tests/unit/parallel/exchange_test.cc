#include "meshloom/parallel/ring_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/parallel/executor.h"
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

/// Against the largest element of the whole tensor, of which this rank sees a part. With a window
/// of one token the gradients of q and k vanish, and rounding alone is left: a floor keeps the
/// ratio defined, well below the values of order one that all others have.
double worst(const at::Tensor& a, const at::Tensor& b, const at::Tensor& whole) {
  if (a.numel() == 0) return 0.0;
  constexpr double kFloor = 1e-3;
  return a.sub(b).abs().max().item<double>() / std::max(kFloor, whole.abs().max().item<double>());
}

struct Case {
  int ranks;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t window;
  std::vector<std::int64_t> lengths;
  std::int64_t v_dim = 8;
};

void check(const Case& c, plan::Exchange kind = plan::Exchange::kRing) {
  const std::int64_t dim = 8;
  const auto total = std::accumulate(c.lengths.begin(), c.lengths.end(), std::int64_t{0});
  const auto q = random_tensor({total, c.heads, dim}, 1);
  const auto k = random_tensor({total, c.kv_heads, dim}, 2);
  const auto v = random_tensor({total, c.kv_heads, c.v_dim}, 3);
  const auto dout = random_tensor({total, c.heads, c.v_dim}, 4);
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
    plan::Unit unit = plan.slots[0].units[0];
    unit.exchange = kind;
    const auto exchange = make_exchange(hdp, unit, {});
    const auto out = exchange->forward(pick(q), pick(k), pick(v), batch, options);
    EXPECT_LE(worst(out.out, pick(expected.out), expected.out), kFp64Tolerance);
    const auto gradients =
        exchange->backward(pick(dout), pick(q), pick(k), pick(v), out, batch, options);
    EXPECT_LE(worst(gradients.dq, pick(expected_gradients.dq), expected_gradients.dq),
              kFp64Tolerance);
    EXPECT_LE(worst(gradients.dk, pick(expected_gradients.dk), expected_gradients.dk),
              kFp64Tolerance);
    EXPECT_LE(worst(gradients.dv, pick(expected_gradients.dv), expected_gradients.dv),
              kFp64Tolerance);
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

class Exchanges : public ::testing::TestWithParam<plan::Exchange> {};

INSTANTIATE_TEST_SUITE_P(Kinds, Exchanges,
                         ::testing::Values(plan::Exchange::kAllGather, plan::Exchange::kUlysses),
                         [](const auto& entry) {
                           return std::string(plan::to_string(entry.param));
                         });

TEST_P(Exchanges, EqualLocalAttentionOnAnyNumberOfRanks) {
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    SCOPED_TRACE(ranks);
    check({.ranks = ranks,
           .heads = 4,
           .kv_heads = 2,
           .window = 0,
           .lengths = {1, 97, 3, 16 * ranks, 2 * ranks, 13}},
          GetParam());
  }
}

TEST_P(Exchanges, CarryAnyHeadCounts) {
  for (const std::int64_t heads : {3, 7, 8}) {
    for (const std::int64_t kv_heads : {1, 2, 8}) {
      if (heads % kv_heads != 0) continue;
      for (const int ranks : {2, 3, 8}) {
        SCOPED_TRACE(heads * 100 + kv_heads * 10 + ranks);
        check({.ranks = ranks,
               .heads = heads,
               .kv_heads = kv_heads,
               .window = 0,
               .lengths = {41, 5, 64}},
              GetParam());
      }
    }
  }
}

TEST_P(Exchanges, RespectSlidingWindows) {
  for (const std::int64_t window : {1, 7, 33, 1000}) {
    SCOPED_TRACE(window);
    check({.ranks = 3, .heads = 4, .kv_heads = 2, .window = window, .lengths = {50, 2, 101}},
          GetParam());
  }
}

TEST_P(Exchanges, CarryValuesOfAnotherSizeThanKeys) {
  for (const std::int64_t v_dim : {5, 12}) {
    SCOPED_TRACE(v_dim);
    check({.ranks = 3, .heads = 4, .kv_heads = 4, .window = 0, .lengths = {41, 5}, .v_dim = v_dim},
          GetParam());
    check({.ranks = 4, .heads = 6, .kv_heads = 2, .window = 0, .lengths = {64}, .v_dim = v_dim},
          GetParam());
  }
}

TEST(RingExchange, CarriesValuesOfAnotherSizeThanKeys) {
  for (const std::int64_t v_dim : {5, 12}) {
    SCOPED_TRACE(v_dim);
    check({.ranks = 3, .heads = 4, .kv_heads = 4, .window = 0, .lengths = {41, 5}, .v_dim = v_dim});
    check({.ranks = 4, .heads = 6, .kv_heads = 2, .window = 0, .lengths = {64}, .v_dim = v_dim});
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

/// Collects the sizes of all tensor storage that its thread allocates while `run` runs.
class AllocationLog final : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t /*allocated*/,
                         std::size_t /*reserved*/, c10::Device /*device*/) override {
    if (bytes > 0) sizes_.push_back(bytes);
  }
  bool memoryProfilingEnabled() const override { return true; }

  template <class Body>
  static std::vector<std::int64_t> during(const Body& run) {
    const auto log = std::make_shared<AllocationLog>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, log);
    run();
    return log->sizes_;
  }

 private:
  std::vector<std::int64_t> sizes_;
};

/// One document on `degree` ranks, and what a rank of it passes to its exchange.
struct Share {
  Share(std::int64_t length, int degree, int index)
      : plan(plan_of({length}, ranks_below(degree))),
        batch(build_batch(plan, plan.slots[0].units[0], index, row_numbers({length}), at::kCPU)) {
    const auto rows = batch.size();
    q = random_tensor({rows, 6, 16}, 1);
    k = random_tensor({rows, 2, 16}, 2);
    v = random_tensor({rows, 2, 16}, 3);
    dout = random_tensor({rows, 6, 16}, 4);
  }
  static std::vector<int> ranks_below(int degree) {
    std::vector<int> ranks(static_cast<std::size_t>(degree));
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
  }
  plan::StepPlan plan;
  model::SequenceBatch batch;
  at::Tensor q, k, v, dout;
};

TEST(RingExchange, SteadyStateAllocatesResultsAlone) {
  const model::AttentionOptions options{.scale = 0.25, .window = 0};
  for (const int degree : {2, 3, 4}) {
    comm::run_thread_ranks(degree, [&](comm::Communicator hdp) {
      const Share share(240 * degree, degree, hdp.rank());
      const auto buffers = std::make_shared<ExchangeBuffers>();
      const auto rows = share.batch.size();
      // Blocks that travel hold keys and values, 2 heads of 16; queries have 6. Kernels have
      // scratch of their own, of other sizes.
      const std::int64_t block_bytes = 2 * rows * 2 * 16 * 8;
      const std::int64_t out_bytes = rows * 6 * 16 * 8;
      const auto large = [&](std::vector<std::int64_t> sizes) {
        std::erase_if(sizes,
                      [&](auto bytes) { return bytes != block_bytes && bytes != out_bytes; });
        std::sort(sizes.begin(), sizes.end());
        return sizes;
      };
      const auto once = [&] {
        // A new exchange a micro-batch, as the executor makes them.
        RingExchange ring(hdp, Share::ranks_below(degree), {}, buffers);
        model::AttentionOutput out;
        const auto forward = AllocationLog::during(
            [&] { out = ring.forward(share.q, share.k, share.v, share.batch, options); });
        const auto backward = AllocationLog::during([&] {
          (void)ring.backward(share.dout, share.q, share.k, share.v, out, share.batch, options);
        });
        // What the row sums of dout * out need is their own affair.
        const auto delta =
            AllocationLog::during([&] { (void)model::attention_delta(share.dout, out.out); });
        auto without_delta = large(backward);
        for (const auto bytes : large(delta)) {
          without_delta.erase(std::find(without_delta.begin(), without_delta.end(), bytes));
        }
        return std::pair(large(forward), without_delta);
      };
      const auto first = once();
      const auto later = once();
      EXPECT_EQ(later.first, std::vector<std::int64_t>{out_bytes});
      // dk with dv, and dq.
      EXPECT_EQ(later.second, (std::vector<std::int64_t>{block_bytes, out_bytes}));
      EXPECT_GE(first.first.size() + first.second.size(), 7U) << "the log saw no buffers";
    });
  }
}

TEST(RingExchange, TransfersAreInFlightWhileBlocksCompute) {
  // From posting to the wait lies the block's computation: nearly all of the call for the forward,
  // in which all but the last block hide a transfer. A ring that computed first would have next to
  // nothing there; the limit leaves room for a busy machine.
  constexpr double kHidden = 0.2;
  const model::AttentionOptions options{.scale = 0.25, .window = 0};
  comm::run_thread_ranks(2, [&](comm::Communicator hdp) {
    using Clock = std::chrono::steady_clock;
    const Share share(1600, 2, hdp.rank());
    std::vector<Span> spans;
    RingExchange ring(hdp, {0, 1}, [&](Span::Kind kind, Clock::time_point a, Clock::time_point b) {
      spans.push_back({.kind = kind, .begin = a, .end = b});
    });
    const auto hidden_share = [&](const auto& call, std::size_t transfers) {
      spans.clear();
      const auto begin = Clock::now();
      call();
      const std::chrono::duration<double> whole = Clock::now() - begin;
      EXPECT_EQ(spans.size(), 2 * transfers);
      std::chrono::duration<double> hidden{0};
      for (std::size_t i = 0; i + 1 < spans.size(); i += 2) {
        EXPECT_EQ(spans[i].kind, Span::Kind::kExchange);
        EXPECT_EQ(spans[i + 1].kind, Span::Kind::kWait);
        hidden += spans[i + 1].begin - spans[i].begin;
      }
      return hidden / whole;
    };
    model::AttentionOutput out;
    EXPECT_GT(hidden_share(
                  [&] { out = ring.forward(share.q, share.k, share.v, share.batch, options); }, 1),
              kHidden);
    EXPECT_GT(hidden_share(
                  [&] {
                    (void)ring.backward(share.dout, share.q, share.k, share.v, out, share.batch,
                                        options);
                  },
                  3),
              kHidden);
  });
}

TEST(RingExchange, BytesSentAreTheClosedForm) {
  // Keys and values once around but for the last hop, 2 * Hkv * D values a token; in backward the
  // same and their gradients all around.
  const model::AttentionOptions options{.scale = 0.25, .window = 0};
  for (const int degree : {1, 2, 3, 5}) {
    std::atomic<std::int64_t> forward{0};
    std::atomic<std::int64_t> backward{0};
    const std::int64_t length = 67;
    comm::run_thread_ranks(degree, [&](comm::Communicator hdp) {
      const Share share(length, degree, hdp.rank());
      RingExchange ring(hdp, Share::ranks_below(degree));
      const auto sent = [&] { return hdp.traffic()["exchange"].sent_bytes; };
      const auto out = ring.forward(share.q, share.k, share.v, share.batch, options);
      const auto half = sent();
      forward += half;
      (void)ring.backward(share.dout, share.q, share.k, share.v, out, share.batch, options);
      backward += sent() - half;
    });
    const std::int64_t token_bytes = 2 * 2 * 16 * 8;
    EXPECT_EQ(forward, (degree - 1) * length * token_bytes);
    EXPECT_EQ(backward, degree == 1 ? 0 : (2 * degree - 1) * length * token_bytes);
  }
}

TEST(RingExchange, RefusesAUnitWithoutThisRank) {
  auto world = comm::make_thread_world(2);
  EXPECT_THROW(RingExchange(world[0], {1}), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::parallel
