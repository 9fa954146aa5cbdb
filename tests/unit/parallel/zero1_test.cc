#include "meshloom/parallel/zero1.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "meshloom/comm/backends.h"

namespace meshloom::parallel {
namespace {

model::ParameterTable table_of(std::int64_t elements) {
  model::ParameterTable table;
  table.elements = elements;
  return table;
}

class Zero1Types : public testing::TestWithParam<at::ScalarType> {};

TEST_P(Zero1Types, StepUpdatesEveryElementOnEveryRank) {
  const auto type = GetParam();
  for (const int ranks : {1, 2, 3, 5}) {
    comm::run_thread_ranks(ranks, [&](comm::Communicator group) {
      Zero1 state(table_of(11), group, type, at::kCPU);
      state.assign(at::arange(11, at::TensorOptions().dtype(at::kDouble)));
      state.zero_gradients();
      state.gradients().add_(group.rank() + 1);
      state.reduce();
      const double sum = ranks * (ranks + 1) / 2.0;
      EXPECT_EQ(state.shard_gradient().numel(), state.own_range().size());
      if (state.own_range().size() > 0) {
        EXPECT_EQ(state.shard_gradient().min().to(at::kDouble).item<double>(), sum);
        EXPECT_EQ(state.shard_gradient().max().to(at::kDouble).item<double>(), sum);
      }
      state.master().sub_(state.shard_gradient());
      state.gather();
      const auto expected =
          at::arange(11, at::TensorOptions().dtype(at::kDouble)).sub(sum).to(type);
      EXPECT_TRUE(at::equal(state.values(), expected));
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Zero1Types,
                         testing::Values(at::kFloat, at::kDouble, at::kBFloat16));

TEST(Zero1, RangesCoverTheFlatSpaceOnce) {
  comm::run_thread_ranks(4, [](comm::Communicator group) {
    const Zero1 state(table_of(3), group, at::kFloat, at::kCPU);
    std::int64_t end = 0;
    for (int rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(state.range(rank).begin, end);
      EXPECT_LE(state.range(rank).size(), 1);
      end = state.range(rank).end;
    }
    EXPECT_EQ(end, 3);
  });
}

TEST(Zero1, MastersKeepWhatBfloat16Drops) {
  comm::run_thread_ranks(2, [](comm::Communicator group) {
    Zero1 state(table_of(4), group, at::kBFloat16, at::kCPU);
    state.assign(at::ones({4}, at::TensorOptions().dtype(at::kDouble)));
    // One bf16 spacing above 1 is 2^-7; eight additions of 2^-10 vanish one by one in bf16.
    for (int i = 0; i < 8; ++i) {
      state.master().add_(0x1p-10);
      state.gather();
    }
    EXPECT_EQ(state.values()[0].item<double>(), 1.0 + 0x1p-7);
  });
}

TEST(Zero1, GatherWritesParametersInPlace) {
  // An all-gather of its own would need a second buffer of the model's size each step.
  class Log final : public c10::MemoryReportingInfoBase {
   public:
    void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t /*allocated*/,
                           std::size_t /*reserved*/, c10::Device /*device*/) override {
      largest = std::max(largest, bytes);
    }
    bool memoryProfilingEnabled() const override { return true; }
    std::int64_t largest = 0;
  };
  comm::run_thread_ranks(3, [](comm::Communicator group) {
    Zero1 state(table_of(3000), group, at::kFloat, at::kCPU);
    state.assign(at::ones({3000}, at::TensorOptions().dtype(at::kFloat)));
    state.master().add_(group.rank());
    const void* address = state.values().const_data_ptr();
    const auto log = std::make_shared<Log>();
    {
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, log);
      state.gather();
    }
    EXPECT_LT(log->largest, 1000);
    EXPECT_EQ(state.values().const_data_ptr(), address);
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_TRUE(state.values().narrow(0, 1000 * rank, 1000).eq(1.0 + rank).all().item<bool>());
    }
  });
}

}  // namespace
}  // namespace meshloom::parallel
