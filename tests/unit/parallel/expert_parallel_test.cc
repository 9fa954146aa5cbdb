// Expert parallelism through the executor: loss and every gradient as on one rank.

#include "meshloom/parallel/expert_parallel.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"
#include "rank_run.h"

namespace meshloom::parallel {
namespace {

// DESIGN.md, Precision: within 1e-10 of each tensor's largest element in fp64.
constexpr double kExpertParity = 1e-10;

/// Three layers, the middle one dense; six experts, which 4 ranks share unevenly.
constexpr const char* kMixed = R"({
  "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 59,
  "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12,
  "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
  "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": true, "decoder_sparse_step": 1,
  "mlp_only_layers": [1], "hidden_act": "silu", "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "initializer_range": 0.2, "router_aux_loss_coef": 0.0})";

SampleTokens document_of(std::int64_t id, std::int64_t length, std::int64_t vocab) {
  SampleTokens document;
  for (std::int64_t t = 0; t < length; ++t) {
    const auto bits =
        random_bits(static_cast<std::uint64_t>(id) + 91, static_cast<std::uint64_t>(t));
    document.tokens.push_back(static_cast<std::int32_t>(bits % static_cast<std::uint64_t>(vocab)));
  }
  return document;
}

struct StepResult {
  double loss = 0.0;
  at::Tensor gradients;
  at::Tensor values;  ///< after the step, as rank 0 collects them
  std::int64_t expert_elements = 0;
};

model::ModelConfig mixed_config() { return model::ModelConfig::from_json(kMixed); }

plan::StepPlan planned(const Layout& layout, const std::vector<std::int64_t>& lengths,
                       std::int64_t capacity, const std::string& strategy) {
  plan::PlanProblem problem;
  problem.layout = layout;
  problem.capacity_tokens = capacity;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    problem.samples.push_back(
        {.id = static_cast<std::int64_t>(i), .tokens = lengths[i], .loss_tokens = lengths[i] - 1});
  }
  return plan::make_plan(problem, strategy);
}

/// One step of plain gradient descent on masters.
StepResult run_plan(const plan::StepPlan& plan) {
  const model::ModelConfig config = mixed_config();
  const auto programs = plan::compile(plan, {.layers = static_cast<int>(config.layers)});
  plan::verify(plan, programs);
  StepResult result;
  std::mutex mutex;
  comm::run_thread_ranks(plan.layout.hdp, [&](comm::Communicator hdp) {
    RankRun rank(hdp, place_model(config, plan.layout), at::kDouble);
    ModelState& state = rank.state;
    const SampleLoader load = [&](std::int64_t id) {
      return document_of(id, plan.samples[static_cast<std::size_t>(id)].tokens, config.vocab_size);
    };
    const auto& program = programs[static_cast<std::size_t>(hdp.rank())];
    const StepOutcome outcome = rank.executor.run(plan, program, load, state, nullptr, [&] {
      for (ModelState::Part& part : state.parts()) {
        part.space.master().sub_(part.space.shard_gradient(), 0.1);
      }
    });
    const at::Tensor gradients = state.whole_gradients();
    const at::Tensor after = state.whole_values();
    EXPECT_EQ(after.defined(), hdp.rank() == 0);
    const std::lock_guard lock(mutex);
    result.loss += outcome.loss_sum / static_cast<double>(plan.total_loss_tokens());
    if (hdp.rank() != 0) return;
    result.gradients = gradients.clone();
    result.values = after.clone();
    for (const ModelState::Part& part : state.parts()) {
      if (part.place.set == ReplicaSet::kExpert) {
        result.expert_elements += part.space.table().elements;
      }
    }
  });
  return result;
}

void expect_same(const StepResult& given, const StepResult& expected) {
  EXPECT_NEAR(given.loss, expected.loss, kExpertParity * expected.loss);
  const model::ModelConfig config = mixed_config();
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  for (const auto& spec : table.parameters) {
    const auto a = given.gradients.narrow(0, spec.offset, spec.elements());
    const auto b = expected.gradients.narrow(0, spec.offset, spec.elements());
    const double largest = b.abs().max().item<double>();
    ASSERT_GT(largest, 0.0) << spec.name << " has no gradient: the test would prove nothing";
    EXPECT_LE(a.sub(b).abs().max().item<double>(), kExpertParity * largest) << spec.name;
    const auto v = given.values.narrow(0, spec.offset, spec.elements());
    const auto w = expected.values.narrow(0, spec.offset, spec.elements());
    EXPECT_LE(v.sub(w).abs().max().item<double>(), kExpertParity) << spec.name;
  }
}

TEST(ExpertParallel, EveryGroupSizeEqualsOneRank) {
  const std::int64_t capacity = 20;
  for (const auto& [hdp, ep] : std::vector<std::pair<int, int>>{
           {2, 2}, {3, 3}, {4, 2}, {4, 4}, {6, 3}, {8, 2}, {8, 4}, {8, 8}}) {
    // A document that fills the axis, some for units of two and three, the shortest of one token.
    const std::vector<std::int64_t> lengths{1, 2, 13, 19, 5, capacity * hdp, 37, 58, 3, 1};
    std::vector<std::int64_t> fitting;
    for (const auto length : lengths) fitting.push_back(std::min(length, capacity * hdp));
    const StepResult expected = run_plan(planned({.hdp = 1}, fitting, 1 << 12, "balanced"));
    for (const char* strategy : {"static", "balanced"}) {
      SCOPED_TRACE("hdp " + std::to_string(hdp) + ", ep " + std::to_string(ep) + ", " + strategy);
      expect_same(run_plan(planned({.hdp = hdp, .ep = ep}, fitting, capacity, strategy)), expected);
    }
  }
}

/// Units of one, two, three and all ranks, across the borders of expert groups, with idle ranks in
/// groups that run and whole groups that do not.
TEST(ExpertParallel, UnitsOfAnyRanksAndIdleMembersEqualOneRank) {
  using plan::Exchange;
  const std::vector<std::int64_t> lengths{40, 9, 1, 31, 22, 17, 1, 6};
  const StepResult expected = run_plan(planned({.hdp = 1}, lengths, 1 << 12, "balanced"));
  for (const int ep : {2, 4}) {
    plan::StepPlan plan;
    plan.strategy = "by hand";
    plan.layout = {.hdp = 4, .ep = ep};
    plan.lockstep = plan::Lockstep::kEp;
    plan.capacity_tokens = 64;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      plan.samples.push_back({.id = static_cast<std::int64_t>(i),
                              .tokens = lengths[i],
                              .loss_tokens = lengths[i] - 1});
    }
    plan.slots = {
        {{{.ranks = {2, 1, 0}, .samples = {0, 1}, .exchange = Exchange::kRing}}},
        {{{.ranks = {3}, .samples = {2, 7}, .exchange = Exchange::kLocal}}},
        {{{.ranks = {1, 2}, .samples = {3}, .exchange = Exchange::kRing},
          {.ranks = {0}, .samples = {6}, .exchange = Exchange::kLocal}}},
        {{{.ranks = {3, 0, 1, 2}, .samples = {4, 5}, .exchange = Exchange::kRing}}},
    };
    plan::predict_(plan);
    plan::verify(plan);
    SCOPED_TRACE(ep);
    expect_same(run_plan(plan), expected);
  }
}

TEST(ExpertParallel, RanksHoldTheirOwnExpertsAlone) {
  const std::vector<std::int64_t> lengths{30, 5, 8, 3};
  const StepResult two = run_plan(planned({.hdp = 4, .ep = 2}, lengths, 32, "balanced"));
  const model::ModelConfig config = mixed_config();
  // Gate, up and down of two layers with mixture of experts.
  const std::int64_t expert = 2 * 3 * config.hidden_size * config.moe.intermediate_size;
  EXPECT_EQ(two.expert_elements, 3 * expert);
  const StepResult four = run_plan(planned({.hdp = 4, .ep = 4}, lengths, 32, "balanced"));
  EXPECT_EQ(four.expert_elements, 1 * expert);  // member 0 of 1 + 2 + 1 + 2
}

TEST(ExpertParallel, EveryElementIsUpdatedByOneRank) {
  const model::ModelConfig config = mixed_config();
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  for (const int ep : {1, 2, 4, 8}) {
    std::mutex mutex;
    std::vector<int> owners(static_cast<std::size_t>(table.elements), 0);
    comm::run_thread_ranks(8, [&](comm::Communicator hdp) {
      const ModelPlacement placement = place_model(config, {.hdp = 8, .ep = ep});
      Groups groups(hdp, placement);
      const ModelState state(placement, groups, at::kFloat, at::kCPU);
      const std::lock_guard lock(mutex);
      for (const ModelState::Part& part : state.parts()) {
        const FlatRange own = part.space.own_range();
        for (const auto& spec : part.space.table().parameters) {
          const std::int64_t whole = table.find(spec.name).offset;
          for (std::int64_t i = 0; i < spec.elements(); ++i) {
            const std::int64_t at = spec.offset + i;
            if (at < own.begin || at >= own.end) continue;
            ++owners[static_cast<std::size_t>(whole + i)];
          }
        }
      }
    });
    EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), table.elements) << "ep " << ep;
  }
}

TEST(ExpertParallel, FailureDuringDispatchEndsEveryRankWithItsReason) {
  const auto plan = planned({.hdp = 4, .ep = 2}, {30, 5, 8, 3, 60, 21}, 32, "balanced");
  const model::ModelConfig config = mixed_config();
  const auto programs = plan::compile(plan, {.layers = static_cast<int>(config.layers)});
  std::mutex mutex;
  std::vector<std::string> messages;
  comm::run_thread_ranks(4, [&](comm::Communicator hdp) {
    ExecutorOptions options;
    options.before = [&](const plan::Instruction& instruction) {
      if (hdp.rank() == 1 && instruction.op == plan::Op::kBackward) {
        throw DataError("test", "planted failure");
      }
    };
    RankRun rank(hdp, place_model(config, plan.layout), at::kFloat, options);
    const SampleLoader load = [&](std::int64_t id) {
      return document_of(id, plan.samples[static_cast<std::size_t>(id)].tokens, config.vocab_size);
    };
    try {
      (void)rank.executor.run(plan, programs[static_cast<std::size_t>(hdp.rank())], load,
                              rank.state, nullptr, [] {});
    } catch (const Error& error) {
      const std::lock_guard lock(mutex);
      messages.emplace_back(error.what());
    }
  });
  ASSERT_EQ(messages.size(), 4U);
  for (const std::string& message : messages) {
    EXPECT_NE(message.find("planted failure"), std::string::npos) << message;
    EXPECT_NE(message.find("rank 1/4 in step 0, backward"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace meshloom::parallel
