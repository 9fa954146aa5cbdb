#include "meshloom/train/gradients.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/model/safetensors.h"
#include "meshloom/model/stage.h"
#include "meshloom/parallel/executor.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/model_state.h"
#include "train/internal/collective.h"
#include "train/internal/setup.h"

namespace meshloom::train {

namespace {

constexpr const char* kGradientsWhere = "train.gradients";

plan::StepPlan plan_documents(const GradientsOptions& options, const Layout& layout,
                              const std::vector<data::Document>& documents,
                              const plan::BalanceStrategy* strategy) {
  plan::PlanProblem problem;
  problem.layout = layout;
  if (options.parallel.zero > 1) problem.lockstep = plan::Lockstep::kHdp;
  std::int64_t total = 0;
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const auto tokens = static_cast<std::int64_t>(documents[i].tokens.size());
    problem.samples.push_back({.id = static_cast<std::int64_t>(i),
                               .tokens = tokens,
                               .loss_tokens = documents[i].loss_tokens()});
    total += tokens;
    longest = std::max(longest, tokens);
  }
  const auto share = [&](std::int64_t tokens) { return (tokens + layout.hdp - 1) / layout.hdp; };
  problem.capacity_tokens = options.capacity_tokens > 0
                                ? options.capacity_tokens
                                : std::max<std::int64_t>({1, share(total), share(longest)});
  return strategy != nullptr ? plan::make_plan(problem, options.strategy, *strategy)
                             : plan::make_plan(problem, options.strategy);
}

/// A plan from outside has to be about these documents, on these ranks.
void check_given_plan(const plan::StepPlan& plan, const Layout& layout,
                      const std::vector<data::Document>& documents) {
  if (!(plan.layout == layout)) {
    throw PlanError(kGradientsWhere, fmt::format("the plan is for layout {}, the run has {}",
                                                 plan.layout.to_string(), layout.to_string()));
  }
  if (plan.samples.size() != documents.size()) {
    throw PlanError(kGradientsWhere, fmt::format("the plan has {} samples, there are {} documents",
                                                 plan.samples.size(), documents.size()));
  }
  for (const plan::SampleInfo& sample : plan.samples) {
    if (sample.id < 0 || sample.id >= static_cast<std::int64_t>(documents.size())) {
      throw PlanError(kGradientsWhere,
                      fmt::format("sample {} of the plan: there are {} documents, counted from 0",
                                  sample.id, documents.size()));
    }
    const data::Document& document = documents[static_cast<std::size_t>(sample.id)];
    const auto tokens = static_cast<std::int64_t>(document.tokens.size());
    if (sample.tokens != tokens || sample.loss_tokens != document.loss_tokens()) {
      throw PlanError(kGradientsWhere,
                      fmt::format("sample {} has {} tokens, {} of them targets, in the plan; the "
                                  "document has {} and {}",
                                  sample.id, sample.tokens, sample.loss_tokens, tokens,
                                  document.loss_tokens()));
    }
  }
}

/// @throws InvalidArgument  names the document and the place in it.
void check_documents(const std::vector<data::Document>& documents, std::int64_t vocab_size) {
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const data::Document& document = documents[i];
    if (!document.loss_mask.empty() && document.loss_mask.size() != document.tokens.size()) {
      throw InvalidArgument(kGradientsWhere,
                            fmt::format("document {} has {} tokens and a loss_mask of {}", i,
                                        document.tokens.size(), document.loss_mask.size()));
    }
    for (std::size_t t = 0; t < document.tokens.size(); ++t) {
      if (document.tokens[t] < 0 || document.tokens[t] >= vocab_size) {
        throw InvalidArgument(kGradientsWhere,
                              fmt::format("document {} has token {} at position {}, expected 0 to "
                                          "{}: the model's vocab_size is {}",
                                          i, document.tokens[t], t, vocab_size - 1, vocab_size));
      }
    }
  }
}

}  // namespace

GradientsResult gradients(const GradientsOptions& options,
                          const std::vector<data::Document>& documents, comm::Communicator world,
                          std::shared_ptr<plan::BalanceStrategy> strategy) {
  const detail::Hosts hosts = detail::find_hosts(world);
  std::optional<detail::LocalFailure> failure;
  parallel::ModelPlacement placement;
  std::vector<std::shared_ptr<model::Stage>> stages;
  std::unique_ptr<parallel::ModelState> state;
  std::unique_ptr<model::BalanceLoss> balance;
  model::ModelConfig config;
  std::string plan_text;
  Layout layout;
  at::Device device(at::kCPU);
  try {
    layout = detail::resolve_layout(options.layout, world.size(), kGradientsWhere);
    device = detail::parse_device(options.device, hosts.local_rank);
    config = model::ModelConfig::load(options.model + "/config.json");
    placement = detail::place(config, layout, options.parallel, hosts);
    check_documents(documents, config.vocab_size);
    if (options.capacity_tokens < 0) {
      throw InvalidArgument(
          kGradientsWhere,
          fmt::format("capacity_tokens is {}, expected at least 0", options.capacity_tokens));
    }
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  detail::agree(world, kGradientsWhere, failure);
  parallel::Groups groups(world, placement);
  const plan::CompileOptions compile =
      detail::compile_options(placement, options.parallel.pipeline);
  try {
    stages = parallel::build_stages(placement, groups.at());
    state = std::make_unique<parallel::ModelState>(placement, groups,
                                                   detail::parse_dtype_name(options.dtype), device);
    state->assign([&](const model::ParameterTable& table, at::Tensor& values) {
      model::load_pretrained(options.model, config, table, values);
    });
    if (options.aux_loss) {
      balance = model::make_balance_loss("global", config.moe.aux_loss_coefficient, config);
    }
    if (world.rank() == 0) {
      if (options.plan) check_given_plan(*options.plan, layout, documents);
      const plan::StepPlan plan =
          options.plan ? *options.plan : plan_documents(options, layout, documents, strategy.get());
      detail::verify_step(plan, compile);
      if (plan.total_loss_tokens() == 0) {
        throw InvalidArgument(kGradientsWhere, fmt::format("none of {} documents has a loss token",
                                                           documents.size()));
      }
      plan_text = plan.to_json();
    }
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  detail::agree(world, kGradientsWhere, failure);

  GradientsResult result;
  result.plan = plan::StepPlan::from_json(detail::broadcast_text(world, plan_text, 0));
  plan::Program program = plan::compile_rank(result.plan, compile, world.rank());
  std::erase_if(program.instructions, [](const plan::Instruction& instruction) {
    return instruction.op == plan::Op::kStep;
  });
  const parallel::SampleLoader load = [&](std::int64_t sample) {
    const data::Document& document = documents.at(static_cast<std::size_t>(sample));
    return parallel::SampleTokens{document.tokens, document.loss_mask};
  };
  parallel::ExecutorOptions executor_options;
  executor_options.record_spans = false;
  executor_options.recompute = model::parse_recompute(options.parallel.recompute);
  parallel::Executor executor(stages, placement, groups, executor_options);
  const auto sum = [&](at::Tensor& counts) {
    world.all_reduce_(counts, comm::ReduceOp::kSum, {.timeout = std::nullopt, .purpose = "balance"})
        .wait();
  };
  if (balance) {
    balance->begin_step(result.plan.total_tokens());
    if (balance->needs_counting()) {
      static_cast<void>(executor.evaluate(result.plan, program, load, *state, balance.get()));
      balance->finish_counting(sum);
    }
  }
  const parallel::StepOutcome outcome =
      executor.run(result.plan, program, load, *state, balance.get(), [] {});
  const at::Tensor summed = state->whole_gradients();
  if (balance) balance->end_step(sum);

  for (const std::vector<double>& rank :
       detail::gather_numbers(world, {outcome.loss_sum, balance ? balance->loss() : 0.0})) {
    result.loss += rank[0];
    result.aux_loss += rank[1];
  }
  result.loss =
      result.loss / static_cast<double>(result.plan.total_loss_tokens()) + result.aux_loss;
  for (auto& [name, gradient] : model::views_like_checkpoint(
           options.model, config, model::parameter_table(config, {0, config.layers}, true, true),
           summed)) {
    result.names.push_back(name);
    result.gradients.push_back(gradient.cpu().clone());
  }
  return result;
}

void save_gradients(const GradientsResult& result, const std::string& path) {
  model::NamedTensors tensors;
  tensors.emplace_back("loss", at::full({}, result.loss, at::kDouble));
  for (std::size_t i = 0; i < result.names.size(); ++i) {
    tensors.emplace_back(result.names[i], result.gradients[i]);
  }
  model::save_safetensors(path, tensors, {{"format", "pt"}});
}

}  // namespace meshloom::train
