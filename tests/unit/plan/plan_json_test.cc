#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "support.h"

namespace meshloom::plan {
namespace {

using testing::hand_made_plan;

std::string refusal(const std::string& text) {
  try {
    (void)StepPlan::from_json(text);
  } catch (const PlanError& error) {
    return error.what();
  }
  return "accepted";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

TEST(PlanJson, ReadsBackEqualWithEqualBytes) {
  StepPlan plan = hand_made_plan();
  plan.memory = {.layers = 32, .resident_layers = 2};
  plan.slots[0].units[0].offload = 0.1;
  plan.slots[1].units[0].exchange = Exchange::kRingUlysses;
  plan.slots[1].units[0].ulysses_degree = 2;
  plan.predicted.step_time = 1.0 / 3.0;
  plan.lockstep = Lockstep::kHdp;
  plan.ranks_per_node = 3;
  plan.strategy = "a \"quoted\"\n\\ näme";
  const std::string text = plan.to_json();
  const StepPlan back = StepPlan::from_json(text);
  EXPECT_EQ(back, plan);
  EXPECT_EQ(back.to_json(), text);
  EXPECT_EQ(back.hash(), plan.hash());
}

TEST(PlanJson, ReadsTheFormatsExample) {
  const StepPlan plan = StepPlan::from_json(R"({
    "format": "meshloom.plan/1", "step": 0, "strategy": "balanced",
    "layout": {"tp": 1, "hdp": 8, "pp": 1, "ep": 1, "chunks": 1},
    "capacity_tokens": 8192, "lockstep": "none",
    "memory": {"layers": 32, "resident_layers": 2},
    "cost": {"quadratic": 1.0, "linear": 24576.0, "fixed": 0.0, "exchange": 0.0},
    "samples": [{"id": 0, "tokens": 6144, "loss_tokens": 6143}],
    "slots": [{"units": [{"ranks": [2, 3, 4], "samples": [0], "exchange": "ring", "offload": 0.0}]}],
    "predicted": {"makespan": 0.0, "lower_bound": 0.0, "efficiency": 1.0, "exchange_tokens": 0}
  })");
  EXPECT_EQ(plan.layout.hdp, 8);
  EXPECT_EQ(plan.memory.layers, 32);
  EXPECT_EQ(plan.ranks_per_node, 0);  // files from before the field
  EXPECT_EQ(plan.slots.at(0).units.at(0).ranks, (std::vector<int>{2, 3, 4}));
  EXPECT_EQ(plan.slots[0].units[0].exchange, Exchange::kRing);
}

TEST(PlanJson, UnknownFieldsAreIgnoredAndDefaultsFilled) {
  std::string text = hand_made_plan().to_json();
  text = replaced(text, "\"lockstep\": \"none\",", "\"colour\": {\"deep\": [1, null, true]},");
  const StepPlan plan = StepPlan::from_json(text);
  EXPECT_EQ(plan, hand_made_plan());
}

TEST(PlanJson, OtherFormatIsRefused) {
  const std::string text = hand_made_plan().to_json();
  EXPECT_NE(refusal(replaced(text, "plan/1", "plan/2")).find("format is \"meshloom.plan/2\""),
            std::string::npos);
  EXPECT_NE(refusal("{}").find("format is missing"), std::string::npos);
  EXPECT_NE(refusal("[]").find("the file is an array, expected an object"), std::string::npos);
}

// Every kind of wrong field is refused with the path of the field.
TEST(PlanJson, WrongFieldIsNamedByPath) {
  const std::string text = hand_made_plan().to_json();
  const std::vector<std::vector<std::string>> cases = {
      {"\"step\": 7", "\"step\": -1", "step is -1"},
      {"\"step\": 7", "\"step\": 7.0", "step is 7 (not an integer)"},
      {"\"step\": 7", "\"stop\": 7", "step is missing"},
      {"\"strategy\": \"by hand\"", "\"strategy\": 3", "strategy is 3, expected a string"},
      {"\"hdp\": 4", "\"hdp\": 0", "layout.hdp is 0"},
      {"\"hdp\": 4", "\"hdp\": 99999999999999999999", "layout.hdp is"},
      {"\"hdp\": 4", "\"hdp\": 2147483647", "layout: [mesh.layout] hdp is 2147483647"},
      {"\"ep\": 1", "\"ep\": 3", "ep is 3"},
      {"\"capacity_tokens\": 100", "\"capacity_tokens\": 0", "capacity_tokens is 0"},
      {"\"capacity_tokens\": 100", "\"capacity_tokens\": \"100\"", "capacity_tokens is \"100\""},
      {"\"lockstep\": \"none\"", "\"lockstep\": \"some\"", "known: none, ep, hdp"},
      {"\"quadratic\": 1.0", "\"quadratic\": -1.0", "cost.quadratic is -1"},
      {"\"fixed\": 5.0", "\"fixed\": null", "cost.fixed is null"},
      {"\"tokens\": 40", "\"tokens\": 0", "samples[1].tokens is 0"},
      {"\"tokens\": 40", "\"tokens\": -40", "samples[1].tokens is -40"},
      {"\"tokens\": 40", "\"tokens\": 9223372036854775807", "samples[1].tokens is"},
      {"\"tokens\": 40, ", "", "samples[1].tokens is missing"},
      {"\"loss_tokens\": 39", "\"loss_tokens\": true", "samples[1].loss_tokens is true"},
      {"\"ranks\": [1, 2]", "\"ranks\": [1, -2]", "slots[1].units[0].ranks[1] is -2"},
      {"\"ranks\": [1, 2]", "\"ranks\": 1", "slots[1].units[0].ranks is 1, expected an array"},
      {"\"ranks\": [1, 2]", "\"ranks\": [1, [2]]", "slots[1].units[0].ranks[1] is an array"},
      {"\"samples\": [14]", "\"samples\": [\"14\"]", "slots[1].units[0].samples[0] is \"14\""},
      {"\"exchange\": \"all_gather\"", "\"exchange\": \"gossip\"",
       "slots[1].units[0].exchange is \"gossip\", expected a known name; known: local, ring"},
      {"\"exchange\": \"all_gather\"", "\"exchange\": \"ring_ulysses\"",
       "slots[1].units[0].ulysses_degree is missing"},
      {"\"offload\": 0.0", "\"offload\": 1.5", "slots[0].units[0].offload is 1.5"},
      {"\"offload\": 0.0", "\"offload\": -0.1", "slots[0].units[0].offload is -0.1"},
      {"\"efficiency\":", "\"effort\":", "predicted.efficiency is missing"},
      {"\"exchange_tokens\":", "\"step_time\": \"now\", \"exchange_tokens\":",
       "predicted.step_time is \"now\""},
  };
  for (const auto& c : cases) {
    const std::string message = refusal(replaced(text, c[0], c[1]));
    EXPECT_NE(message.find(c[2]), std::string::npos) << c[1] << " gave: " << message;
    EXPECT_EQ(message.rfind("[plan.from_json]", 0), 0U) << message;
  }
}

TEST(PlanJson, BrokenTextIsRefused) {
  const std::string text = hand_made_plan().to_json();
  for (std::size_t cut = 0; cut < text.size() - 2; cut += 7) {
    EXPECT_NE(refusal(text.substr(0, cut)), "accepted") << cut;
  }
  EXPECT_NE(refusal(text + "x"), "accepted");
  EXPECT_NE(refusal(replaced(text, "5.0", "NaN")), "accepted");
  EXPECT_NE(refusal(replaced(text, "5.0", "1e999")), "accepted");
  EXPECT_NE(refusal(replaced(text, "by hand", "\xff\xfe")), "accepted");
  EXPECT_NE(refusal(replaced(text, "\"step\": 7", "\"step\": 7, \"step\": 8"))
                .find("the key \"step\" occurs twice"),
            std::string::npos);
}

TEST(PlanJson, DeepNestingIsRefusedWithoutRecursion) {
  EXPECT_NE(refusal(std::string(2'000'000, '[')).find("nested deeper"), std::string::npos);
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_NE(refusal(objects).find("nested deeper"), std::string::npos);
}

TEST(PlanJson, NumbersThatJsonCannotHoldAreNotWritten) {
  StepPlan plan = hand_made_plan();
  plan.predicted.makespan = std::nan("");
  EXPECT_THROW((void)plan.to_json(), PlanError);
  plan = hand_made_plan();
  plan.cost.fixed = std::numeric_limits<double>::infinity();
  EXPECT_THROW((void)plan.to_json(), PlanError);
}

TEST(PlanJson, AnyChangeChangesTheHash) {
  const StepPlan plan = hand_made_plan();
  StepPlan other = plan;
  std::swap(other.slots[0].units[0].ranks[0], other.slots[0].units[0].ranks[1]);
  EXPECT_NE(other.hash(), plan.hash());
  other = plan;
  other.cost.linear = std::nextafter(plan.cost.linear, 1e9);
  EXPECT_NE(other.hash(), plan.hash());
}

RC_GTEST_PROP(PlanJson, FlippedBytesNeverCrash, ()) {
  std::string text = hand_made_plan().to_json();
  const int flips = *rc::gen::inRange(1, 6);
  for (int i = 0; i < flips; ++i) {
    const auto at = *rc::gen::inRange<std::size_t>(0, text.size());
    text[at] = *rc::gen::arbitrary<char>();
  }
  try {
    (void)check_plan(StepPlan::from_json(text));
  } catch (const PlanError&) {
  }
}

RC_GTEST_PROP(PlanJson, EveryDoubleReadsBack, (double value)) {
  RC_PRE(std::isfinite(value));
  StepPlan plan = hand_made_plan();
  plan.predicted.makespan = std::abs(value);
  RC_ASSERT(StepPlan::from_json(plan.to_json()).predicted.makespan == std::abs(value));
}

}  // namespace
}  // namespace meshloom::plan
