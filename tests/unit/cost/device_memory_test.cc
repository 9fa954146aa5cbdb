#include "meshloom/cost/device_memory.h"

#include <gtest/gtest.h>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

constexpr ModelSizes kLlama7b{.layers = 32,
                              .hidden = 4096,
                              .heads = 32,
                              .key_value_heads = 32,
                              .head_dim = 128,
                              .intermediate = 11008,
                              .vocabulary = 32000};

TEST(DeviceMemory, ParametersOfLlamaArePublished) {
  EXPECT_EQ(parameter_count(kLlama7b), 6738415616);  // the checkpoint's
}

TEST(DeviceMemory, BytesOfATokenByKindOfLayer) {
  const LayerBytes bytes = saved_bytes_per_token(kLlama7b);
  EXPECT_DOUBLE_EQ(bytes.norms, 2 * (4096 * 2 + 4));
  EXPECT_DOUBLE_EQ(bytes.attention, 5 * 4096 * 2 + 32 * 4);
  EXPECT_DOUBLE_EQ(bytes.feed_forward, (4096 + 3 * 11008) * 2);
  ModelSizes sparse = kLlama7b;
  sparse.experts = 8;
  sparse.experts_per_token = 2;
  EXPECT_DOUBLE_EQ(saved_bytes_per_token(sparse).feed_forward,
                   2 * bytes.feed_forward + 4096 * 2 + 8 * 4);
}

TEST(DeviceMemory, CapacityIsWhatStatesLeave) {
  const StateSharding sharding{.tp = 2, .pp = 4, .replicas = 8};
  const double states = 6738415616.0 / 8 * (2 + 4 + 12.0 / 8);
  EXPECT_DOUBLE_EQ(state_bytes(kLlama7b, sharding), states);
  const std::int64_t tokens = capacity_tokens(80e9, 5e9, kLlama7b, sharding);
  const double held = saved_bytes_per_token(kLlama7b).total() * 32 / 2;
  EXPECT_LE(static_cast<double>(tokens) * held, 75e9 - states);
  EXPECT_GT(static_cast<double>(tokens + 1) * held, 75e9 - states);
  EXPECT_THROW((void)capacity_tokens(8e9, 0.0, kLlama7b, {}), InvalidArgument);
}

TEST(DeviceMemory, BadSizesAreNamed) {
  ModelSizes bad = kLlama7b;
  bad.heads = 0;
  EXPECT_THROW((void)saved_bytes_per_token(bad), InvalidArgument);
  bad = kLlama7b;
  bad.experts = 4;
  bad.experts_per_token = 5;
  EXPECT_THROW((void)parameter_count(bad), InvalidArgument);
}

}  // namespace
}  // namespace meshloom
