// Activations that leave a device for pinned memory come back as they were, behind computation that
// overwrites what they left.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include "meshloom/parallel/activation_offload.h"

namespace meshloom::parallel {
namespace {

using model::Activation;

constexpr std::int64_t kOnDevice = std::int64_t{1} << 24;
constexpr std::int64_t kLayers = 6;

at::Tensor layer_values(std::int64_t layer) {
  return at::arange(kOnDevice, at::TensorOptions().dtype(at::kFloat).device(at::kCUDA)).add_(layer);
}

TEST(OffloadOnGpu, WhatLeavesComesBackAsItWas) {
  const MemoryModel memory{.layers = kLayers, .resident_layers = 2, .transfer = 0.0};
  ActivationOffload offload;
  for (const double ratio : {0.25, 0.5, 1.0}) {
    offload.begin_step(memory, kLayers);
    const auto store = offload.make_store(ratio, {0, kLayers});
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      store->push(Activation::kMlp, layer_values(layer));
      store->layer_done(layer);
      at::empty({kOnDevice}, at::TensorOptions().dtype(at::kFloat).device(at::kCUDA)).fill_(-1.0);
    }
    EXPECT_NEAR(static_cast<double>(store->bytes()),
                memory.resident_fraction(ratio) * kLayers * kOnDevice * 4, 1e5);
    for (std::int64_t layer = kLayers - 1; layer >= 0; --layer) {
      EXPECT_TRUE(store->pop(Activation::kMlp).equal(layer_values(layer))) << "layer " << layer;
    }
    const OffloadOutcome outcome = offload.outcome();
    EXPECT_NEAR(static_cast<double>(outcome.out.bytes), (kLayers - 2) * ratio * kOnDevice * 4, 1e5);
    EXPECT_EQ(outcome.back.bytes, outcome.out.bytes);
    EXPECT_GT(outcome.out.seconds, 0.0);
    EXPECT_GT(outcome.back.seconds, 0.0);
  }
}

}  // namespace
}  // namespace meshloom::parallel
