#include "meshloom/model/balance_losses.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>

#include "meshloom/core/check.h"

namespace meshloom::model {
namespace {

constexpr const char* kBalanceWhere = "model.balance";

/// Choices of each expert, fp64 [E].
at::Tensor count_choices(const at::Tensor& experts, std::int64_t count) {
  return at::bincount(experts.reshape({-1}), {}, count).to(at::kDouble);
}

at::Tensor zero_counts(at::IntArrayRef shape) {
  return at::zeros(shape, at::TensorOptions().dtype(at::kDouble));
}

}  // namespace

BalanceLoss::BalanceLoss(double coefficient, std::int64_t experts, std::int64_t moe_layers)
    : coefficient_(coefficient), experts_(experts), moe_layers_(moe_layers) {
  MESHLOOM_CHECK(experts > 0 && moe_layers > 0, kBalanceWhere,
                 "a balance loss needs a model with mixture-of-experts layers");
}

BalanceLoss::~BalanceLoss() = default;

void BalanceLoss::begin_step(std::int64_t tokens) {
  MESHLOOM_CHECK_GT(tokens, 0, kBalanceWhere, "tokens of the step");
  tokens_ = tokens;
  loss_ = 0.0;
}

void BalanceLoss::end_step(const Sum& /*sum*/) {}

void BalanceLoss::finish_counting(const Sum& /*sum*/) {
  throw InvalidArgument(kBalanceWhere, "this balance loss has no counting pass");
}

void BalanceLoss::load_state(const at::Tensor& state) {
  MESHLOOM_CHECK(!state.defined(), kBalanceWhere, "this balance loss has no state");
}

void BalanceLoss::account(const at::Tensor& gradient, const at::Tensor& probabilities) {
  const at::Tensor sums = probabilities.sum(0, false, at::kDouble);
  loss_ += (gradient.to(at::kDouble) * sums).sum().item<double>();
}

double BalanceLoss::scale() const {
  MESHLOOM_CHECK_GT(tokens_, 0, kBalanceWhere, "tokens of the step, set by begin_step");
  return coefficient_ * static_cast<double>(experts_) /
         (static_cast<double>(tokens_) * static_cast<double>(moe_layers_));
}

void GlobalBalance::begin_step(std::int64_t tokens) {
  BalanceLoss::begin_step(tokens);
  counts_ = zero_counts({experts_});
  gradient_.reset();
}

void GlobalBalance::finish_counting(const Sum& sum) {
  MESHLOOM_CHECK(counts_.defined(), kBalanceWhere, "finish_counting without begin_step");
  if (sum) sum(counts_);
  const double rows = static_cast<double>(tokens_) * static_cast<double>(moe_layers_);
  gradient_ = (counts_ * (scale() / rows)).view({1, experts_});
  counts_.reset();
}

at::Tensor GlobalBalance::observe(int /*layer*/, const at::Tensor& probabilities,
                                  const at::Tensor& experts, const SequenceBatch& /*batch*/) {
  if (!gradient_.defined()) {
    MESHLOOM_CHECK(counts_.defined(), kBalanceWhere, "observe before begin_step");
    counts_ += count_choices(experts, experts_).to(counts_.device());
    return {};
  }
  account(gradient_.view({experts_}).to(probabilities.device()), probabilities);
  return gradient_.to(probabilities.options());
}

GlobalLaggedBalance::GlobalLaggedBalance(double coefficient, const ModelConfig& config)
    : BalanceLoss(coefficient, config.moe.experts,
                  std::count(config.moe_layers.begin(), config.moe_layers.end(), true)),
      counts_(zero_counts({config.layers, config.moe.experts})) {}

void GlobalLaggedBalance::begin_step(std::int64_t tokens) {
  BalanceLoss::begin_step(tokens);
  counts_.zero_();
}

void GlobalLaggedBalance::end_step(const Sum& sum) {
  MESHLOOM_CHECK_GT(tokens_, 0, kBalanceWhere, "tokens of the step, set by begin_step");
  if (sum) sum(counts_);
  frequencies_ = counts_ / static_cast<double>(tokens_);
}

void GlobalLaggedBalance::load_state(const at::Tensor& state) {
  if (state.defined()) {
    MESHLOOM_CHECK(state.sizes() == counts_.sizes(), kBalanceWhere,
                   fmt::format("state must be [{}, {}]", counts_.size(0), counts_.size(1)));
  }
  frequencies_ = state.defined() ? state.to(at::kDouble) : state;
}

at::Tensor GlobalLaggedBalance::observe(int layer, const at::Tensor& probabilities,
                                        const at::Tensor& experts, const SequenceBatch& /*batch*/) {
  const double factor = scale();
  counts_[layer] += count_choices(experts, experts_).to(counts_.device());
  if (!frequencies_.defined()) return {};
  const at::Tensor gradient = (frequencies_[layer] * factor).to(probabilities.device());
  account(gradient, probabilities);
  return gradient.view({1, experts_}).to(probabilities.options());
}

at::Tensor SequenceBalance::observe(int /*layer*/, const at::Tensor& probabilities,
                                    const at::Tensor& experts, const SequenceBatch& batch) {
  const auto documents = static_cast<std::int64_t>(batch.documents.size());
  if (documents == 0) return {};  // an idle member of a lockstep group
  at::Tensor gradient = zero_counts({documents, experts_});
  std::int64_t row = 0;
  for (std::int64_t d = 0; d < documents; ++d) {
    const std::int64_t rows = batch.documents[std::size_t(d)].tokens();
    if (rows > 0) gradient[d] = count_choices(experts.narrow(0, row, rows), experts_);
    row += rows;
  }
  if (unit_sum_) unit_sum_(gradient);  // counts of whole documents
  const double factor = scale();
  row = 0;
  for (std::int64_t d = 0; d < documents; ++d) {
    const DocumentSlice& document = batch.documents[std::size_t(d)];
    if (document.length > 0) {
      gradient[d] *= factor / static_cast<double>(document.length);
    }
    const std::int64_t rows = document.tokens();
    if (rows > 0)
      account(gradient[d].to(probabilities.device()), probabilities.narrow(0, row, rows));
    row += rows;
  }
  return gradient.to(probabilities.options());
}

std::unique_ptr<BalanceLoss> make_balance_loss(const std::string& form, double coefficient,
                                               const ModelConfig& config) {
  if (form == "none") return nullptr;
  // DeepSeek-V3, whose scores are sigmoid, counts choices per token and choice.
  if (config.moe.score == RouterScore::kSigmoid) {
    coefficient /= static_cast<double>(config.moe.experts_per_token);
  }
  const auto layers = std::count(config.moe_layers.begin(), config.moe_layers.end(), true);
  if (form == "global") {
    return std::make_unique<GlobalBalance>(coefficient, config.moe.experts, layers);
  }
  if (form == "global_lagged") return std::make_unique<GlobalLaggedBalance>(coefficient, config);
  if (form == "sequence") {
    return std::make_unique<SequenceBalance>(coefficient, config.moe.experts, layers);
  }
  throw InvalidArgument(kBalanceWhere,
                        fmt::format("unknown balance loss \"{}\"; known: none, global_lagged, "
                                    "sequence, global",
                                    form));
}

}  // namespace meshloom::model
