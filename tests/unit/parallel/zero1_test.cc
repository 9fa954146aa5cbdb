#include "meshloom/parallel/zero1.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace meshloom::parallel
