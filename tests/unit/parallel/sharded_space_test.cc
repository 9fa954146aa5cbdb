#include "meshloom/parallel/sharded_space.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "meshloom/comm/backends.h"

namespace meshloom::parallel {
namespace {

model::ParameterTable table_of(std::int64_t elements) {
  model::ParameterTable table;
  table.append({.name = "weight", .shape = {elements}});
  return table;
}

void reduce(ShardedSpace& space) {
  space.start_reduce();
  space.finish_reduce();
}

void gather(ShardedSpace& space) {
  space.start_gather();
  space.finish_gather();
}

class ShardedSpaces : public testing::TestWithParam<std::tuple<at::ScalarType, Zero>> {};

TEST_P(ShardedSpaces, StepUpdatesEveryElementOnEveryRank) {
  const auto [type, zero] = GetParam();
  for (const int ranks : {1, 2, 3, 5}) {
    comm::run_thread_ranks(ranks, [&, type = type, zero = zero](comm::Communicator group) {
      ShardedSpace space(table_of(11), Replicas(group), zero, type, at::kCPU);
      const auto start = at::arange(11, at::TensorOptions().dtype(at::kDouble));
      space.assign(start);
      EXPECT_TRUE(at::equal(space.values(), start.to(type)));
      space.drop();
      space.zero_gradients();
      space.gradients().add_(group.rank() + 1);
      if (space.zero() != Zero::kOptimizer) {  // sums may come micro-batch by micro-batch
        reduce(space);
        space.gradients().add_(1);
      } else {
        space.gradients().add_(1);
      }
      reduce(space);
      const double sum = ranks * (ranks + 1) / 2.0 + ranks;
      EXPECT_EQ(space.shard_gradient().numel(), space.own_range().size());
      if (space.own_range().size() > 0) {
        EXPECT_EQ(space.shard_gradient().min().to(at::kDouble).item<double>(), sum);
        EXPECT_EQ(space.shard_gradient().max().to(at::kDouble).item<double>(), sum);
      }
      space.master().sub_(space.shard_gradient());
      gather(space);
      EXPECT_TRUE(at::equal(space.values(), start.sub(sum).to(type)));
      space.drop();
      space.zero_gradients();
      space.gradients().add_(1);
      reduce(space);
      EXPECT_TRUE(space.shard_gradient().eq(ranks).all().item<bool>()) << "an older sum is left";
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Types, ShardedSpaces,
                         testing::Combine(testing::Values(at::kFloat, at::kDouble, at::kBFloat16),
                                          testing::Values(Zero::kOptimizer, Zero::kGradients,
                                                          Zero::kParameters)));

TEST(ShardedSpace, MastersKeepWhatBfloat16Drops) {
  for (const Zero zero : {Zero::kOptimizer, Zero::kParameters}) {
    comm::run_thread_ranks(2, [&](comm::Communicator group) {
      ShardedSpace space(table_of(4), Replicas(group), zero, at::kBFloat16, at::kCPU);
      space.assign(at::ones({4}, at::TensorOptions().dtype(at::kDouble)));
      // One bf16 spacing above 1 is 2^-7; eight additions of 2^-10 vanish one by one in bf16.
      for (int i = 0; i < 8; ++i) {
        space.master().add_(0x1p-10);
        gather(space);
      }
      EXPECT_EQ(space.values()[0].item<double>(), 1.0 + 0x1p-7);
    });
  }
}

/// Largest allocation, and what is held, of one thread.
class Memory final : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t /*allocated*/,
                         std::size_t /*reserved*/, c10::Device /*device*/) override {
    held += bytes;
    peak = std::max(peak, held);
  }
  bool memoryProfilingEnabled() const override { return true; }
  std::int64_t held = 0;
  std::int64_t peak = 0;
};

TEST(ShardedSpace, WhatIsShardedIsNotHeld) {
  constexpr std::int64_t kElements = 30'000;
  constexpr std::int64_t kBytes = kElements * 4;
  constexpr std::int64_t kSlack = 4096;  // alignment, small tensors
  comm::run_thread_ranks(3, [&](comm::Communicator group) {
    for (const Zero zero : {Zero::kOptimizer, Zero::kGradients, Zero::kParameters}) {
      const auto memory = std::make_shared<Memory>();
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
      ShardedSpace space(table_of(kElements), Replicas(group), zero, at::kFloat, at::kCPU);
      // Values, of which the master is a part, and gradients; or a third of either.
      const std::int64_t expected = zero == Zero::kOptimizer   ? 2 * kBytes
                                    : zero == Zero::kGradients ? kBytes
                                                               : kBytes / 3;
      EXPECT_LE(std::abs(memory->held - expected), kSlack) << static_cast<int>(zero);
      group.barrier().wait();
    }
  });
}

}  // namespace
}  // namespace meshloom::parallel
