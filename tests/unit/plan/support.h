#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::plan::testing {

/// A valid plan by hand: 4 ranks of 100 tokens; sample 10 (300 tokens) on ranks 2, 0, 3, then bins.
inline StepPlan hand_made_plan() {
  StepPlan plan;
  plan.step = 7;
  plan.strategy = "by hand";
  plan.layout.hdp = 4;
  plan.capacity_tokens = 100;
  plan.cost = {.quadratic = 1.0, .linear = 10.0, .fixed = 5.0, .exchange = 0.5};
  plan.samples = {{10, 300, 299}, {11, 40, 39}, {12, 60, 0}, {13, 100, 50}, {14, 150, 149}};
  plan.slots.resize(2);
  plan.slots[0].units = {
      {.ranks = {2, 0, 3}, .samples = {10}, .exchange = Exchange::kRing},
      {.ranks = {1}, .samples = {11, 12}},
  };
  plan.slots[1].units = {
      {.ranks = {1, 2}, .samples = {14}, .exchange = Exchange::kAllGather},
      {.ranks = {0}, .samples = {13}},
  };
  predict_(plan);
  return plan;
}

/// Lengths with a body of short documents and a few long ones, from a small congruential generator.
inline std::vector<std::int64_t> mixed_lengths(int count, std::int64_t longest, unsigned seed) {
  std::vector<std::int64_t> lengths;
  unsigned long long state = seed * 2654435761ULL + 12345;
  const auto draw = [&](std::int64_t most) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return 1 + static_cast<std::int64_t>((state >> 33) % static_cast<unsigned long long>(most));
  };
  for (int i = 0; i < count; ++i) {
    lengths.push_back(i % 12 == 0 ? draw(longest) : draw(std::min<std::int64_t>(longest, 1000)));
  }
  return lengths;
}

inline std::string all_text(const std::vector<Violation>& violations) {
  std::string text;
  for (const auto& violation : violations)
    text += violation.contract + ": " + violation.message + "\n";
  return text;
}

inline void expect_violation(const std::vector<Violation>& violations, const std::string& contract,
                             const std::vector<std::string>& parts) {
  for (const auto& violation : violations) {
    if (violation.contract != contract) continue;
    bool all = true;
    for (const auto& part : parts) all = all && violation.message.find(part) != std::string::npos;
    if (all) return;
  }
  ADD_FAILURE() << "no \"" << contract << "\" violation with " << ::testing::PrintToString(parts)
                << " in:\n"
                << all_text(violations);
}

}  // namespace meshloom::plan::testing
