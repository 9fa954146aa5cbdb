#include "meshloom/plan/memory_forecast.h"

#include <gtest/gtest.h>

#include "meshloom/core/error.h"
#include "meshloom/plan/memory_changes.h"

namespace meshloom::plan {
namespace memory_forecast_tests {

MemorySetting setting_of(const Layout& layout) {
  MemorySetting setting;
  setting.model = {.hidden = 256,
                   .heads = 8,
                   .key_value_heads = 4,
                   .head_dim = 32,
                   .intermediate = 768,
                   .vocabulary = 8192,
                   .moe_layers = std::vector<bool>(8, false)};
  setting.layout = layout;
  return setting;
}

constexpr StepLimits kLimits{
    .capacity = 4096, .global_batch = std::int64_t{1} << 20, .longest_document = 4096};

std::int64_t bytes(const MemorySetting& setting, const StepLimits& limits = kLimits) {
  return fullest(setting, limits).total();
}

TEST(MemoryForecasts, StatesAreCountedToTheByte) {
  const MemorySetting setting = setting_of({});
  const std::int64_t count = parameter_count(setting.model);
  const MemoryForecast forecast = fullest(setting, kLimits);
  EXPECT_EQ(forecast.of(MemoryPart::kParameters), 4 * count);
  EXPECT_EQ(forecast.of(MemoryPart::kGradients), 4 * count);
  EXPECT_EQ(forecast.of(MemoryPart::kMasters), 0);  // the parameters themselves
  EXPECT_EQ(forecast.of(MemoryPart::kOptimizer), 8 * count);
  EXPECT_EQ(forecast.states(), 16 * count);
  MemorySetting half = setting;
  half.element_bytes = 2;
  EXPECT_EQ(fullest(half, kLimits).states(), (2 + 4 + 4 + 8) * count);
}

TEST(MemoryForecasts, SavedActivationsAreTheLayersOwn) {
  const MemoryForecast forecast = fullest(setting_of({}), kLimits);
  constexpr std::int64_t kTokens = 4096;
  // At the first layer of backward: queries, keys, values, output, and log-sum-exp of all layers.
  EXPECT_EQ(forecast.of(MemoryPart::kAttention), 8 * kTokens * 4 * (2 * 8 * 32 + 2 * 4 * 32 + 8));
  EXPECT_GE(forecast.of(MemoryPart::kFeedForward), 7 * kTokens * 4 * 2 * 768);
}

TEST(MemoryForecasts, EverySettingDoesWhatItIsFor) {
  for (const Layout& layout : {Layout{.hdp = 4}, Layout{.tp = 2, .hdp = 2}, Layout{.pp = 4}}) {
    MemorySetting setting = setting_of(layout);
    const std::int64_t plain = bytes(setting);
    setting.recompute = "selective";
    const std::int64_t selective = bytes(setting);
    setting.recompute = "full";
    EXPECT_LT(bytes(setting), selective);
    EXPECT_LT(selective, plain);
    EXPECT_LT(bytes(setting_of(layout), {.capacity = 2048, .global_batch = 1 << 20}), plain);
  }
  MemorySetting sharded = setting_of({.hdp = 4});
  sharded.bucket_elements = 1;
  std::int64_t former = bytes(sharded);
  for (const int zero : {2, 3}) {
    sharded.zero = zero;
    EXPECT_LT(bytes(sharded), former) << zero;
    former = bytes(sharded);
  }
}

TEST(MemoryForecasts, StagesHoldAsManyMicroBatchesAsTheSchedule) {
  const auto saved = [](const MemoryForecast& forecast) {
    return forecast.of(MemoryPart::kAttention);
  };
  const auto stages = forecast_memory(setting_of({.pp = 4}), kLimits);
  ASSERT_EQ(stages.size(), 4U);
  for (int stage = 0; stage < 4; ++stage) {
    EXPECT_EQ(saved(stages[static_cast<std::size_t>(stage)]), (4 - stage) * saved(stages[3]))
        << stage;
  }
}

TEST(MemoryForecasts, LongDocumentsNeedBuffersForTheirExchange) {
  const MemorySetting setting = setting_of({.hdp = 4});
  EXPECT_EQ(fullest(setting, kLimits).of(MemoryPart::kExchange), 0);
  StepLimits limits = kLimits;
  limits.longest_document = 2 * limits.capacity;
  const StepPlan plan = fullest_step(setting, limits);
  EXPECT_EQ(plan.slots.front().units.front().ranks.size(), 2U);
  EXPECT_GT(fullest(setting, limits).of(MemoryPart::kExchange), 0);
}

TEST(MemoryChanges, EachIsEnoughByItself) {
  const MemorySetting setting = setting_of({.hdp = 4});
  const std::int64_t plain = bytes(setting);
  const auto changes = memory_changes(setting, kLimits, plain * 9 / 10);
  ASSERT_GE(changes.size(), 3U);
  EXPECT_EQ(changes.front().setting.substr(0, 17), "capacity_tokens: ");
  for (const MemoryChange& change : changes) EXPECT_LE(change.bytes, plain * 9 / 10);
  StepLimits smaller = kLimits;
  smaller.capacity = std::stoll(changes.front().setting.substr(17));
  EXPECT_EQ(bytes(setting, smaller), changes.front().bytes);
  smaller.capacity += 64;  // it is the largest that fits
  EXPECT_GT(bytes(setting, smaller), plain * 9 / 10);
}

TEST(MemoryChanges, WhatIsTooLittleForAnySettingSaysHowFarAllOfThemGo) {
  const MemorySetting setting = setting_of({.hdp = 2});
  const auto changes = memory_changes(setting, kLimits, 1 << 20);
  ASSERT_EQ(changes.size(), 1U);
  EXPECT_EQ(changes.front().setting,
            "parallel.recompute: full, parallel.zero: 3, capacity_tokens: 2048");
  EXPECT_GT(changes.front().bytes, 1 << 20);
}

TEST(MemoryForecasts, BadSettingsAreNamed) {
  const auto message = [](const MemorySetting& setting) {
    try {
      (void)forecast_memory(setting, kLimits);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  MemorySetting bad = setting_of({});
  bad.zero = 4;
  EXPECT_NE(message(bad).find("zero is 4"), std::string::npos) << message(bad);
  bad = setting_of({});
  bad.recompute = "some";
  EXPECT_NE(message(bad).find("recompute is some"), std::string::npos) << message(bad);
  bad = setting_of({.pp = 2});
  bad.split = {5, 4};
  EXPECT_NE(message(bad).find("split is [5, 4]"), std::string::npos) << message(bad);
}

}  // namespace memory_forecast_tests
}  // namespace meshloom::plan
