#include "meshloom/parallel/sample_batch.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <set>

#include "meshloom/core/error.h"

namespace meshloom::parallel {
namespace {

plan::StepPlan two_documents(std::int64_t first, std::int64_t second, int degree) {
  plan::StepPlan plan;
  plan.samples = {{.id = 4, .tokens = first, .loss_tokens = first - 1},
                  {.id = 9, .tokens = second, .loss_tokens = 1}};
  plan::Unit unit{.ranks = {}, .samples = {4, 9}};
  for (int r = 0; r < degree; ++r) unit.ranks.push_back(r);
  plan.slots = {{.units = {unit}}};
  return plan;
}

SampleTokens tokens_from(std::int32_t begin, std::int64_t count) {
  SampleTokens result;
  for (std::int64_t t = 0; t < count; ++t) {
    result.tokens.push_back(begin + static_cast<std::int32_t>(t));
  }
  return result;
}

TEST(SampleBatch, MembersHoldEveryTokenAndTargetOnce) {
  for (const int degree : {1, 2, 3, 8}) {
    const auto plan = two_documents(37, 5, degree);
    const auto load = [](std::int64_t id) {
      auto document = id == 4 ? tokens_from(100, 37) : tokens_from(500, 5);
      if (id == 9) document.loss_mask = {1, 0, 0, 1, 0};
      return document;
    };
    std::multiset<std::int64_t> tokens;
    std::multiset<std::int64_t> targets;
    for (int index = 0; index < degree; ++index) {
      const auto batch = build_batch(plan, plan.slots[0].units[0], index, load, at::kCPU);
      const auto* token = batch.tokens.const_data_ptr<std::int64_t>();
      const auto* position = batch.positions.const_data_ptr<std::int64_t>();
      const auto* label = batch.labels.const_data_ptr<std::int64_t>();
      for (std::int64_t t = 0; t < batch.size(); ++t) {
        tokens.insert(token[t]);
        EXPECT_EQ(position[t], token[t] >= 500 ? token[t] - 500 : token[t] - 100);
        if (label[t] == model::kIgnoreLabel) continue;
        EXPECT_EQ(label[t], token[t] + 1);
        targets.insert(label[t]);
      }
    }
    std::multiset<std::int64_t> expected;
    for (std::int64_t t = 100; t < 137; ++t) expected.insert(t);
    for (std::int64_t t = 500; t < 505; ++t) expected.insert(t);
    EXPECT_EQ(tokens, expected);
    std::multiset<std::int64_t> expected_targets{503};
    for (std::int64_t t = 101; t < 137; ++t) expected_targets.insert(t);
    EXPECT_EQ(targets, expected_targets);
  }
}

TEST(SampleBatch, RefusesDocumentsThatAreNotThePlans) {
  const auto plan = two_documents(10, 5, 1);
  const auto& unit = plan.slots[0].units[0];
  const auto shorter = [](std::int64_t) { return tokens_from(0, 5); };
  EXPECT_THROW((void)build_batch(plan, unit, 0, shorter, at::kCPU), DataError);
  const auto wild = [](std::int64_t id) { return tokens_from(id == 4 ? 0 : 3, id == 4 ? 10 : 5); };
  try {
    (void)build_batch(plan, unit, 0, wild, at::kCPU, 9);
    ADD_FAILURE() << "a token outside the vocabulary passed";
  } catch (const DataError& error) {
    EXPECT_NE(std::string(error.what()).find("sample 4: token 9 at position 9"), std::string::npos)
        << error.what();
  }
  const auto all_targets = [](std::int64_t id) { return tokens_from(0, id == 4 ? 10 : 5); };
  EXPECT_THROW((void)build_batch(plan, unit, 0, all_targets, at::kCPU), DataError);
}

}  // namespace
}  // namespace meshloom::parallel
