#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/train/adamw.h"
#include "meshloom/train/schedule.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

// A few roundings of fp64 arithmetic.
constexpr double kRounding = 1e-14;

/// Three tensors, the second one without decay.
model::ParameterTable small_table() {
  model::ParameterTable table;
  std::int64_t offset = 0;
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, bool decay) {
    model::ParameterSpec spec;
    spec.name = name;
    spec.shape = std::move(shape);
    spec.offset = offset;
    spec.decay = decay;
    offset += spec.elements();
    table.parameters.push_back(spec);
  };
  add("layer.0.weight", {3, 4}, true);
  add("layer.0.norm", {5}, false);
  add("layer.1.weight", {2, 3}, true);
  table.elements = offset;
  return table;
}

at::Tensor noise(std::int64_t size, std::uint64_t seed) {
  at::Tensor result = at::empty({size}, at::kDouble);
  for (std::int64_t i = 0; i < size; ++i) {
    result.mutable_data_ptr<double>()[i] =
        random_normal(random_key("noise", seed), static_cast<std::uint64_t>(i));
  }
  return result;
}

/// Loshchilov & Hutter, algorithm 2, one element at a time.
struct PlainAdamW {
  AdamWOptions options;
  std::vector<double> value, average, square;
  int updates = 0;
  void step(const at::Tensor& gradient, const std::vector<ParameterSetting>& by_element,
            double factor) {
    ++updates;
    for (std::size_t i = 0; i < value.size(); ++i) {
      if (by_element[i].frozen) continue;
      const double g = gradient.const_data_ptr<double>()[i];
      const double lr = options.lr * factor * by_element[i].lr_factor;
      value[i] -= lr * by_element[i].weight_decay * value[i];
      average[i] = options.beta1 * average[i] + (1 - options.beta1) * g;
      square[i] = options.beta2 * square[i] + (1 - options.beta2) * g * g;
      const double m = average[i] / (1 - std::pow(options.beta1, updates));
      const double v = square[i] / (1 - std::pow(options.beta2, updates));
      value[i] -= lr * m / (std::sqrt(v) + options.eps);
    }
  }
};

TEST(AdamW, AnyShardingFollowsTheDefinition) {
  const model::ParameterTable table = small_table();
  const AdamWOptions options{.lr = 0.01, .weight_decay = 0.3};
  const std::vector<ParameterRule> rules = {
      {.pattern = "layer\\.1", .lr_factor = 0.5, .weight_decay = 0.1}};
  const std::vector<ParameterSetting> settings = parameter_settings(table, options, rules);
  EXPECT_EQ(settings[0].weight_decay, 0.3);
  EXPECT_EQ(settings[1].weight_decay, 0.0);
  EXPECT_EQ(settings[2].lr_factor, 0.5);
  std::vector<ParameterSetting> by_element;
  for (std::size_t p = 0; p < settings.size(); ++p) {
    by_element.insert(by_element.end(), static_cast<std::size_t>(table.parameters[p].elements()),
                      settings[p]);
  }
  const at::Tensor start = noise(table.elements, 1);
  PlainAdamW plain{.options = options, .value = {}, .average = {}, .square = {}};
  plain.value.assign(start.const_data_ptr<double>(),
                     start.const_data_ptr<double>() + table.elements);
  plain.average.assign(plain.value.size(), 0.0);
  plain.square.assign(plain.value.size(), 0.0);

  const std::int64_t cut = 9;
  at::Tensor values = start.clone();
  std::vector<AdamW> shards;
  shards.emplace_back(table, parallel::FlatRange{0, cut}, values.narrow(0, 0, cut), options, rules);
  shards.emplace_back(table, parallel::FlatRange{cut, table.elements},
                      values.narrow(0, cut, table.elements - cut), options, rules);
  for (int step = 0; step < 4; ++step) {
    const at::Tensor gradient = noise(table.elements, static_cast<std::uint64_t>(10 + step));
    const double factor = 1.0 / (step + 1);
    plain.step(gradient, by_element, factor);
    at::Tensor first = gradient.narrow(0, 0, cut).clone();
    at::Tensor second = gradient.narrow(0, cut, table.elements - cut).clone();
    shards[0].step(first, factor);
    shards[1].step(second, factor);
  }
  for (std::int64_t i = 0; i < table.elements; ++i) {
    EXPECT_NEAR(values.const_data_ptr<double>()[i], plain.value[static_cast<std::size_t>(i)],
                kRounding)
        << i;
  }
  EXPECT_EQ(shards[0].updates(), 4);
}

TEST(AdamW, FrozenParametersNeitherMoveNorCount) {
  const model::ParameterTable table = small_table();
  at::Tensor values = noise(table.elements, 1);
  const at::Tensor before = values.clone();
  AdamW optimizer(table, {0, table.elements}, values, {},
                  {{.pattern = "norm", .weight_decay = std::nullopt, .frozen = true}});
  at::Tensor gradient = at::zeros({table.elements}, at::kDouble);
  gradient.narrow(0, 12, 5).fill_(1000.0);
  gradient.narrow(0, 0, 2).fill_(3.0);
  EXPECT_DOUBLE_EQ(optimizer.squared_norm(gradient), 18.0);
  optimizer.step(gradient, 1.0);
  EXPECT_TRUE(values.narrow(0, 12, 5).equal(before.narrow(0, 12, 5)));
  EXPECT_FALSE(values.narrow(0, 0, 2).equal(before.narrow(0, 0, 2)));
}

TEST(AdamW, NormOfSinglePrecisionAccumulatesInDouble) {
  model::ParameterTable table;
  model::ParameterSpec spec;
  spec.name = "w";
  spec.shape = {1'000'000};
  table.parameters.push_back(spec);
  table.elements = 1'000'000;
  const AdamW optimizer(table, {0, table.elements}, at::zeros({table.elements}, at::kFloat), {},
                        {});
  const at::Tensor gradient = at::zeros({table.elements}, at::kFloat).fill_(0.1);
  const double expected = 1e6 * static_cast<double>(0.1F) * static_cast<double>(0.1F);
  EXPECT_NEAR(optimizer.squared_norm(gradient) / expected, 1.0, 1e-12);
}

TEST(AdamW, RuleWithoutAMatchIsRefused) {
  EXPECT_NE(message_of<InvalidArgument>([] {
              static_cast<void>(parameter_settings(
                  small_table(), {}, {{.pattern = "expert", .weight_decay = std::nullopt}}));
            }).find("rules[0]: the pattern \"expert\" matches none"),
            std::string::npos);
}

TEST(Schedule, WarmsUpThenFalls) {
  const ScheduleOptions cosine{.kind = "cosine", .warmup = 4, .steps = 0, .final_fraction = 0.1};
  EXPECT_DOUBLE_EQ(schedule_factor(cosine, 0, 104), 0.2);
  EXPECT_DOUBLE_EQ(schedule_factor(cosine, 3, 104), 0.8);
  EXPECT_DOUBLE_EQ(schedule_factor(cosine, 4, 104), 1.0);
  EXPECT_NEAR(schedule_factor(cosine, 54, 104), 0.55, kRounding);
  EXPECT_NEAR(schedule_factor(cosine, 104, 104), 0.1, kRounding);
  EXPECT_NEAR(schedule_factor(cosine, 1000, 104), 0.1, kRounding);
  const ScheduleOptions linear{.kind = "linear", .warmup = 0, .steps = 10, .final_fraction = 0.0};
  EXPECT_DOUBLE_EQ(schedule_factor(linear, 5, 100), 0.5);
  const ScheduleOptions constant{.kind = "constant", .warmup = 1};
  EXPECT_DOUBLE_EQ(schedule_factor(constant, 0, 10), 0.5);
  EXPECT_DOUBLE_EQ(schedule_factor(constant, 9, 10), 1.0);
}

TEST(CorrectionBias, MovesTowardsTheMeanByOneStepAndNothingElseMoves) {
  model::ParameterTable table;
  table.append({.name = "weight", .shape = {3}});
  table.append({.name = "bias", .shape = {4}, .decay = false, .counts_choices = true});
  table.append({.name = "after", .shape = {2}});
  const AdamWOptions options{.lr = 0.0};
  const auto settings = parameter_settings(table, options, {});
  // Cut anywhere: elements do not need each other.
  for (const std::int64_t cut : {0, 2, 4, 5, 7, 9}) {
    at::Tensor values = at::zeros({9}, at::kDouble);
    at::Tensor counts = at::empty({9}, at::kDouble);
    const double given[] = {9, 9, 9, 5, 7, 6, 0, 9, 9};
    std::copy(given, given + 9, counts.mutable_data_ptr<double>());
    for (const auto& [begin, end] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{0, cut}, {cut, 9}}) {
      at::Tensor master = values.narrow(0, begin, end - begin);
      move_correction_biases_(master, counts.narrow(0, begin, end - begin), table, {begin, end},
                              settings, 6.0, 0.25);
    }
    const double expected[] = {0, 0, 0, 0.25, -0.25, 0, 0.25, 0, 0};
    for (int i = 0; i < 9; ++i) EXPECT_EQ(values.const_data_ptr<double>()[i], expected[i]) << i;
  }
  at::Tensor master = at::zeros({9}, at::kDouble);
  at::Tensor counts = at::arange(9, at::kDouble);
  AdamW optimizer(table, settings, {0, 9}, master, {.lr = 1.0});
  EXPECT_NEAR(optimizer.squared_norm(counts), 0.0 + 1 + 4 + 49 + 64, 1e-10) << "no counts in it";
  optimizer.step(counts, 1.0);
  EXPECT_EQ(master.narrow(0, 3, 4).abs().max().item<double>(), 0.0);
  EXPECT_GT(master.narrow(0, 7, 2).abs().min().item<double>(), 0.0);
  const auto frozen = parameter_settings(table, options, {{.pattern = "bias", .frozen = true}});
  move_correction_biases_(master, counts, table, {0, 9}, frozen, 100.0, 1.0);
  EXPECT_EQ(master.narrow(0, 3, 4).abs().max().item<double>(), 0.0);
}

}  // namespace
}  // namespace meshloom::train
