#include "meshloom/parallel/exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "exchange_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/sample_batch.h"

namespace meshloom::parallel {
namespace {

// fp64 sums over at most some hundred keys, merged in another order.
constexpr double kFp64Tolerance = 1e-12;

using exchange_sweep::random_tensor;
using exchange_sweep::row_numbers;

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

class Kinds : public ::testing::TestWithParam<plan::Exchange> {};

INSTANTIATE_TEST_SUITE_P(Exchanges, Kinds,
                         ::testing::Values(plan::Exchange::kRing, plan::Exchange::kAllGather,
                                           plan::Exchange::kUlysses, plan::Exchange::kRingUlysses),
                         [](const auto& entry) {
                           return std::string(plan::to_string(entry.param));
                         });

struct AllRanks {
  double error = 0.0;
  plan::ExchangeBytes sent;
};

/// A case on thread ranks, one of which is not in the unit where the axis is wider.
AllRanks run_on_threads(const exchange_sweep::Case& c, int world) {
  const exchange_sweep::Whole whole(c);
  AllRanks all;
  std::mutex mutex;
  comm::run_thread_ranks(world, [&](comm::Communicator hdp) {
    const auto found = exchange_sweep::run(hdp, c, whole);
    const std::lock_guard lock(mutex);
    all.error = std::max(all.error, found.error);
    all.sent.forward += found.sent.forward;
    all.sent.backward += found.sent.backward;
  });
  return all;
}

plan::ExchangeBytes closed_form(const exchange_sweep::Case& c) {
  return plan::exchange_bytes(c.lengths, static_cast<int>(c.ranks.size()), c.exchange, c.group,
                              c.shape());
}

TEST(Exchanges, EqualOneProcessAndSendTheClosedForm) {
  constexpr int kWorld = 8;
  constexpr double kShortRun = 0.5;
  int cases = 0;
  exchange_sweep::for_cases_of_run(kWorld, kShortRun, [&](const exchange_sweep::Case& c) {
    SCOPED_TRACE(c.text());
    const AllRanks all = run_on_threads(c, kWorld);
    EXPECT_LE(all.error, kFp64Tolerance);
    EXPECT_EQ(all.sent, closed_form(c));
    ++cases;
  });
  EXPECT_GT(cases, 40);
}

TEST_P(Kinds, NarrowTypesSendTheClosedForm) {
  // bf16 computation has statistics and gradients of fp32; fp32 may send bf16 keys and values.
  const std::pair<at::ScalarType, std::optional<at::ScalarType>> types[] = {
      {at::kBFloat16, std::nullopt}, {at::kFloat, std::nullopt}, {at::kFloat, at::kBFloat16}};
  // Against local attention of the same inputs; bf16 keys are off by at most 2^-9 of themselves.
  constexpr double kFp32Tolerance = 1e-5;
  constexpr double kBf16Tolerance = 0.03;
  for (const auto& [type, wire] : types) {
    exchange_sweep::Case c{.exchange = GetParam(),
                           .group = GetParam() == plan::Exchange::kRingUlysses ? 2 : 0,
                           .ranks = {3, 0, 2, 1},
                           .heads = 7,
                           .kv_heads = 1,
                           .window = 0,
                           .lengths = {90, 1, 6, 33},
                           .type = type,
                           .wire_type = wire};
    SCOPED_TRACE(c10::toString(type));
    const AllRanks all = run_on_threads(c, 4);
    EXPECT_LE(all.error, type == at::kFloat && !wire ? kFp32Tolerance : kBf16Tolerance);
    if (wire) {
      EXPECT_GT(all.error, kFp32Tolerance) << "nothing was rounded";
    }
    EXPECT_EQ(all.sent, closed_form(c));
  }
}

TEST(Exchanges, OneTokenDocumentsSendNothingThroughRings) {
  for (const auto kind : {plan::Exchange::kRing, plan::Exchange::kAllGather}) {
    exchange_sweep::Case c{
        .exchange = kind, .group = 0, .ranks = {0, 1, 2}, .lengths = {}, .wire_type = {}};
    c.lengths = {1, 1, 1, 1};
    EXPECT_EQ(run_on_threads(c, 3).sent, plan::ExchangeBytes{});
    c.lengths = {400};
    c.window = 1;
    EXPECT_EQ(run_on_threads(c, 3).sent, plan::ExchangeBytes{});
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

TEST_P(Kinds, SteadyStateAllocatesResultsAlone) {
  const model::AttentionOptions options{.scale = 0.25, .window = 0};
  for (const int degree : {2, 4}) {
    comm::run_thread_ranks(degree, [&](comm::Communicator hdp) {
      const Share share(240 * degree, degree, hdp.rank());
      const auto buffers = std::make_shared<ExchangeBuffers>();
      // Transfers hold so many heads of all rows: keys and values have 2 each, queries 6, of which
      // a head group of two takes 3. Kernels have scratch of their own, of other sizes but for one:
      // the single key head of four ranks' rows.
      const bool whole_keys =
          GetParam() == plan::Exchange::kRing || GetParam() == plan::Exchange::kAllGather;
      const std::int64_t head_bytes = share.batch.size() * 16 * 8;
      const auto watched = [&](std::vector<std::int64_t> sizes) {
        std::erase_if(sizes, [&](std::int64_t bytes) {
          if (bytes % head_bytes != 0) return true;
          const std::int64_t heads = bytes / head_bytes;
          if (heads == 4) return !whole_keys;
          return heads != 5 && heads != 6 && heads != 8 && heads != 10 && heads != 16;
        });
        std::sort(sizes.begin(), sizes.end());
        return sizes;
      };
      plan::Unit unit = share.plan.slots[0].units[0];
      unit.exchange = GetParam();
      if (GetParam() == plan::Exchange::kRingUlysses) unit.ulysses_degree = 2;
      const auto once = [&] {
        // A new exchange a micro-batch, as the executor makes them.
        const auto exchange = make_exchange(hdp, unit, {}, buffers);
        model::AttentionOutput out;
        auto sizes = watched(AllocationLog::during([&] {
          out = exchange->forward(share.q, share.k, share.v, share.batch, options);
          (void)exchange->backward(share.dout, share.q, share.k, share.v, out, share.batch,
                                   options);
        }));
        // What the row sums of dout * out need is their own affair.
        for (const auto bytes : watched(AllocationLog::during(
                 [&] { (void)model::attention_delta(share.dout, out.out); }))) {
          sizes.erase(std::find(sizes.begin(), sizes.end(), bytes));
        }
        return sizes;
      };
      const auto first = once();
      const auto later = once();
      // The output and dq.
      EXPECT_EQ(later, (std::vector<std::int64_t>{6 * head_bytes, 6 * head_bytes}));
      if (hdp.rank() == 0) {
        EXPECT_GT(first.size(), later.size()) << "the log saw no buffers";
      }
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
    // The best of some runs: a rank that the machine holds up makes the other wait.
    constexpr int kRuns = 5;
    double forward = 0.0;
    double backward = 0.0;
    for (int run = 0; run < kRuns; ++run) {
      model::AttentionOutput out;
      const auto ahead = [&] {
        out = ring.forward(share.q, share.k, share.v, share.batch, options);
      };
      const auto back = [&] {
        (void)ring.backward(share.dout, share.q, share.k, share.v, out, share.batch, options);
      };
      forward = std::max(forward, hidden_share(ahead, 1));
      backward = std::max(backward, hidden_share(back, 2));
    }
    EXPECT_GT(forward, kHidden);
    EXPECT_GT(backward, kHidden);
  });
}

TEST(RingExchange, RefusesAUnitWithoutThisRank) {
  auto world = comm::make_thread_world(2);
  EXPECT_THROW(RingExchange(world[0], {1}), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::parallel
