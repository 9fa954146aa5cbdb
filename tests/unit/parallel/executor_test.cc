#include "meshloom/parallel/executor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/random.h"
#include "meshloom/model/stage.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

namespace meshloom::parallel {
namespace {

// DESIGN.md, Precision: distributed equals single-process within 1e-10 of each tensor's largest
// element in fp64, for loss and every gradient.
constexpr double kParity = 1e-10;

constexpr const char* kMoe = R"({
  "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 61,
  "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
  "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "decoder_sparse_step": 1,
  "mlp_only_layers": [], "hidden_act": "silu", "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
  "initializer_range": 0.2, "router_aux_loss_coef": 0.0})";

constexpr const char* kDense = R"({
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 53,
  "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
  "num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
  "initializer_range": 0.2})";

SampleLoader random_documents(std::vector<std::int64_t> lengths, std::int64_t vocab) {
  return [lengths = std::move(lengths), vocab](std::int64_t id) {
    SampleTokens document;
    for (std::int64_t t = 0; t < lengths[static_cast<std::size_t>(id)]; ++t) {
      const auto bits =
          random_bits(static_cast<std::uint64_t>(id) + 7, static_cast<std::uint64_t>(t));
      document.tokens.push_back(
          static_cast<std::int32_t>(bits % static_cast<std::uint64_t>(vocab)));
    }
    return document;
  };
}

struct Result {
  double loss = 0.0;
  at::Tensor gradients;
  plan::StepPlan plan;
};

Result run_layout(const char* config_text, const std::vector<std::int64_t>& lengths, int ranks,
                  std::int64_t capacity, const std::string& strategy) {
  const auto config = model::ModelConfig::from_json(config_text);
  plan::PlanProblem problem;
  problem.layout.hdp = ranks;
  problem.capacity_tokens = capacity;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    problem.samples.push_back(
        {.id = static_cast<std::int64_t>(i), .tokens = lengths[i], .loss_tokens = lengths[i] - 1});
  }
  Result result;
  result.plan = plan::make_plan(problem, strategy);
  const auto programs =
      plan::compile(result.plan, {.layers = static_cast<int>(config.layers), .schedule = "1f1b"});
  plan::verify(result.plan, programs);
  std::mutex mutex;
  comm::run_thread_ranks(ranks, [&](comm::Communicator hdp) {
    std::shared_ptr<model::Stage> stage =
        model::build_stage(config, {0, config.layers}, true, true);
    Zero1 state(stage->parameters(), hdp, at::kDouble, at::kCPU);
    auto values = at::empty({stage->parameters().elements}, at::TensorOptions().dtype(at::kDouble));
    model::initialize_(values, stage->parameters(), config.initializer_range, 3);
    state.assign(values);
    Executor executor(stage, hdp);
    const auto outcome =
        executor.run(result.plan, programs[static_cast<std::size_t>(hdp.rank())],
                     random_documents(lengths, config.vocab_size), state, nullptr, [] {});
    state.reduce_to_all();  // gradients() still holds this rank's own sums
    const std::lock_guard lock(mutex);
    result.loss += outcome.loss_sum / static_cast<double>(result.plan.total_loss_tokens());
    if (hdp.rank() == 0) result.gradients = state.gradients().clone();
  });
  return result;
}

void expect_equal(const char* config_text, const Result& given, const Result& expected) {
  EXPECT_NEAR(given.loss, expected.loss, kParity * expected.loss);
  const auto config = model::ModelConfig::from_json(config_text);
  const auto stage = model::build_stage(config, {0, config.layers}, true, true);
  for (const auto& spec : stage->parameters().parameters) {
    const auto a = given.gradients.narrow(0, spec.offset, spec.elements());
    const auto b = expected.gradients.narrow(0, spec.offset, spec.elements());
    const double largest = b.abs().max().item<double>();
    ASSERT_GT(largest, 0.0) << spec.name << " has no gradient: the test would prove nothing";
    EXPECT_LE(a.sub(b).abs().max().item<double>(), kParity * largest) << spec.name;
  }
}

void sweep(const char* config_text) {
  for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
    // Length 1, primes, shorter than the rank count, and one that fills all ranks.
    const std::int64_t capacity = 24;
    const std::vector<std::int64_t> lengths{1, 2, 13, 23, 5, capacity * ranks, 17, 7, 3, 1};
    const auto expected = run_layout(config_text, lengths, 1, 1 << 12, "balanced");
    for (const char* strategy : {"static", "naive_hdp", "balanced"}) {
      SCOPED_TRACE(std::to_string(ranks) + " ranks, " + strategy);
      const auto given = run_layout(config_text, lengths, ranks, capacity, strategy);
      expect_equal(config_text, given, expected);
    }
  }
}

TEST(Executor, MixtureOfExpertsEqualsOneRankUnderAnyLayout) { sweep(kMoe); }

TEST(Executor, DenseModelEqualsOneRankUnderAnyLayout) { sweep(kDense); }

TEST(Executor, FailureNamesStepSlotUnitAndSamplesOnEveryRank) {
  const auto config = model::ModelConfig::from_json(kDense);
  plan::PlanProblem problem;
  problem.step = 12;
  problem.layout.hdp = 2;
  problem.capacity_tokens = 32;
  problem.samples = {{.id = 5, .tokens = 60, .loss_tokens = 59}};
  const auto plan = plan::make_plan(problem, "balanced");
  const auto programs = plan::compile(plan, {.layers = 2, .schedule = "1f1b"});
  std::vector<std::string> messages(2);
  const auto body = [&](comm::Communicator hdp) {
    std::shared_ptr<model::Stage> stage = model::build_stage(config, {0, 2}, true, true);
    Zero1 state(stage->parameters(), hdp, at::kFloat, at::kCPU);
    ExecutorOptions options;
    options.before = [&](const plan::Instruction& instruction) {
      if (hdp.rank() == 1 && instruction.op == plan::Op::kBackward) {
        throw DataError("test", "planted failure");
      }
    };
    Executor executor(stage, hdp, options);
    try {
      (void)executor.run(plan, programs[static_cast<std::size_t>(hdp.rank())],
                         random_documents({0, 0, 0, 0, 0, 60}, config.vocab_size), state, nullptr,
                         [] {});
    } catch (const Error& error) {
      messages[static_cast<std::size_t>(hdp.rank())] = error.what();
    }
  };
  comm::run_thread_ranks(2, body);
  for (const char* part :
       {"step 12", "backward", "slot 0", "unit 0", "samples 5", "rank 1/2", "planted failure"}) {
    EXPECT_NE(messages[1].find(part), std::string::npos) << part << " in: " << messages[1];
    EXPECT_NE(messages[0].find(part), std::string::npos) << part << " in: " << messages[0];
  }
}

}  // namespace
}  // namespace meshloom::parallel
