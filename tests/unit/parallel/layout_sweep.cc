#include "layout_sweep.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <memory>
#include <sstream>

#include "meshloom/core/random.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/stage.h"
#include "meshloom/plan/verifier.h"
#include "rank_run.h"

namespace meshloom::parallel::sweep {
namespace {

// Large beside the cross-entropy's gradients, so that a slip in them shows.
constexpr double kBalanceCoefficient = 0.3;

at::Tensor initial_values(const model::ModelConfig& config, const model::ParameterTable& table,
                          at::ScalarType dtype) {
  auto values = at::empty({table.elements}, at::TensorOptions().dtype(dtype));
  model::initialize_(values, table, config.initializer_range, RankRun::kSeed);
  return values;
}

model::ReferenceOptions options_of(const Setting& setting) {
  model::ReferenceOptions options;
  options.balance_form = setting.balance;
  options.balance_coefficient = setting.balance == "none" ? 0.0 : kBalanceCoefficient;
  options.z_coefficient = setting.z_loss;
  return options;
}

double sum_over_ranks(comm::Communicator& hdp, double value) {
  auto tensor = at::full({1}, value, at::kDouble);
  hdp.all_reduce_(tensor).wait();
  return tensor[0].item<double>();
}

}  // namespace

const char* const kMoe = R"({
  "model_type": "qwen3_moe", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
  "moe_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "mlp_only_layers": [0], "attention_bias": true,
  "initializer_range": 0.2})";

const char* const kMixtral = R"({
  "model_type": "mixtral", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 12,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
  "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9,
  "initializer_range": 0.2})";

const char* const kDense = R"({
  "model_type": "llama", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40,
  "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
  "tie_word_embeddings": true, "initializer_range": 0.2})";

std::vector<model::Document> documents(int ranks, std::int64_t vocabulary) {
  std::vector<model::Document> result;
  for (const std::int64_t length :
       std::vector<std::int64_t>{1, 2, 13, 23, 5, kCapacity * ranks, 17, 7, 3, 1, 11}) {
    model::Document document;
    const auto key = static_cast<std::uint64_t>(result.size()) + 7;
    for (std::int64_t t = 0; t < length; ++t) {
      const auto bits = random_bits(key, static_cast<std::uint64_t>(t));
      document.tokens.push_back(
          static_cast<std::int64_t>(bits % static_cast<std::uint64_t>(vocabulary)));
      if (length == 13 || length == 17) document.loss_mask.push_back((bits >> 32) % 3 != 0);
      if (length == 11) document.loss_mask.push_back(false);
    }
    result.push_back(std::move(document));
  }
  return result;
}

SampleLoader loader_of(const std::vector<model::Document>& documents) {
  return [documents](std::int64_t id) {
    const auto& document = documents.at(static_cast<std::size_t>(id));
    return SampleTokens{{document.tokens.begin(), document.tokens.end()},
                        {document.loss_mask.begin(), document.loss_mask.end()}};
  };
}

plan::PlanProblem problem_of(const std::vector<model::Document>& documents, int ranks, int ep) {
  return problem_of(documents, {.hdp = ranks, .ep = ep});
}

plan::PlanProblem problem_of(const std::vector<model::Document>& documents, const Layout& layout) {
  plan::PlanProblem problem;
  problem.layout = layout;
  problem.capacity_tokens = kCapacity;
  for (const auto& document : documents) {
    std::int64_t targets = 0;
    for (std::size_t t = 1; t < document.tokens.size(); ++t) {
      targets += document.loss_mask.empty() || document.loss_mask[t];
    }
    problem.samples.push_back({.id = std::ssize(problem.samples),
                               .tokens = std::ssize(document.tokens),
                               .loss_tokens = targets});
  }
  return problem;
}

Expected solve_alone(const Setting& setting, const std::vector<model::Document>& documents) {
  const auto config = model::ModelConfig::from_json(setting.config);
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  const auto values = initial_values(config, table, setting.dtype);
  auto options = options_of(setting);
  Expected expected;
  if (setting.balance == "global_lagged") {
    // The step before saw other documents.
    expected.former_state =
        model::reference_step(config, values, {documents[5], documents[3]}, options).balance_state;
    options.balance_state = expected.former_state;
  }
  expected.step = model::reference_step(config, values, documents, options);
  return expected;
}

std::string run_and_compare(const Setting& setting, const plan::StepPlan& plan,
                            const std::vector<model::Document>& documents, const Expected& expected,
                            comm::Communicator world) {
  const auto config = model::ModelConfig::from_json(setting.config);
  auto placement = place_model(config, plan.layout, setting.schedule, setting.split, setting.zero);
  placement.ranks_per_node = setting.ranks_per_node;
  const plan::CompileOptions compile{.layers = static_cast<int>(config.layers),
                                     .schedule = setting.schedule,
                                     .table = setting.table,
                                     .split = placement.split};
  const auto programs = plan::compile(plan, compile);
  plan::verify(plan, programs);
  const auto& program = programs[static_cast<std::size_t>(world.rank())];
  ExecutorOptions options;
  options.z_loss_coefficient = setting.z_loss;
  options.recompute = setting.recompute;
  RankRun rank(world, placement, setting.dtype, options);

  const auto load = loader_of(documents);
  const auto sum = [&](at::Tensor& counts) { world.all_reduce_(counts).wait(); };
  const auto balance =
      model::make_balance_loss(setting.balance, options_of(setting).balance_coefficient, config);
  if (balance) {
    balance->load_state(expected.former_state);
    balance->begin_step(plan.total_tokens());
    if (balance->needs_counting()) {
      (void)rank.executor.evaluate(plan, program, load, rank.state, balance.get());
      balance->finish_counting(sum);
    }
  }
  const auto outcome = rank.executor.run(plan, program, load, rank.state, balance.get(), [] {});
  if (balance) balance->end_step(sum);
  const auto gradients = rank.state.whole_gradients();

  std::ostringstream wrong;
  const double parity = setting.dtype == at::kDouble ? kParity : kSingleParity;
  const double loss =
      sum_over_ranks(world, outcome.loss_sum) / static_cast<double>(plan.total_loss_tokens()) +
      setting.z_loss * sum_over_ranks(world, outcome.z_loss_sum) /
          static_cast<double>(plan.total_tokens()) +
      sum_over_ranks(world, balance ? balance->loss() : 0.0);
  const auto& step = expected.step;
  if (!(std::abs(loss - step.loss) <= parity * step.loss)) {
    wrong << "loss " << loss << ", one rank has " << step.loss << "; ";
  }
  if (step.balance_state.defined() && !balance->state().equal(step.balance_state)) {
    wrong << "the balance loss takes another state to the next step; ";
  }
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  for (const auto& spec : table.parameters) {
    const auto a = gradients.narrow(0, spec.offset, spec.elements());
    const auto b = step.gradients.narrow(0, spec.offset, spec.elements());
    const double largest = b.abs().max().item<double>();
    const double error = a.sub(b).abs().max().item<double>();
    if (!(largest > 0.0)) wrong << spec.name << " has no gradient: the test proves nothing; ";
    if (!(error <= parity * largest))
      wrong << spec.name << " is off by " << error / largest << "; ";
  }
  return wrong.str();
}

}  // namespace meshloom::parallel::sweep
