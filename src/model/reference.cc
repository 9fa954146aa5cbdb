#include "meshloom/model/reference.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <memory>

#include "meshloom/core/check.h"
#include "meshloom/model/balance_losses.h"
#include "meshloom/model/stage.h"

namespace meshloom::model {
namespace {

/// One stage with everything a single rank needs around it.
class SingleRank {
 public:
  SingleRank(const ModelConfig& config, const at::Tensor& values, const at::Tensor& gradients)
      : stage_(build_stage(config, {0, config.layers}, true, true)), flat_(values, gradients) {}

  StageContext context(const SequenceBatch& batch, bool training) {
    StageContext result{batch, batch, flat_, attention_, dispatcher_, linear_};
    if (training) {
      result.gradients = &flat_;
      result.activations = &activations_;
    }
    return result;
  }
  Stage& stage() { return *stage_; }

 private:
  std::unique_ptr<Stage> stage_;
  FlatParameters flat_;
  LocalAttention attention_;
  LocalDispatcher dispatcher_;
  LocalLinear linear_;
  ResidentActivations activations_;
};

}  // namespace

SequenceBatch make_batch(const std::vector<Document>& documents, std::int64_t first_sample) {
  std::int64_t total = 0;
  for (const Document& document : documents) {
    total += static_cast<std::int64_t>(document.tokens.size());
  }
  const auto options = at::TensorOptions().dtype(at::kLong);
  SequenceBatch batch{
      at::empty({total}, options), at::empty({total}, options), at::empty({total}, options), {}};
  std::int64_t* tokens = batch.tokens.data_ptr<std::int64_t>();
  std::int64_t* positions = batch.positions.data_ptr<std::int64_t>();
  std::int64_t* labels = batch.labels.data_ptr<std::int64_t>();
  for (const Document& document : documents) {
    const auto length = static_cast<std::int64_t>(document.tokens.size());
    const std::vector<bool>& mask = document.loss_mask;
    MESHLOOM_CHECK(mask.empty() || mask.size() == document.tokens.size(), "model.make_batch",
                   fmt::format("sample {}: loss_mask has {} entries, expected {}", first_sample,
                               mask.size(), length));
    for (std::int64_t t = 0; t < length; ++t) {
      *tokens++ = document.tokens[std::size_t(t)];
      *positions++ = t;
      const bool target = t + 1 < length && (mask.empty() || mask[static_cast<std::size_t>(t + 1)]);
      *labels++ = target ? document.tokens[std::size_t(t + 1)] : kIgnoreLabel;
    }
    batch.documents.push_back({first_sample++, length, {{{0, length}, {length, length}}}});
  }
  return batch;
}

ReferenceStep reference_step(const ModelConfig& config, const at::Tensor& values,
                             const std::vector<Document>& documents,
                             const ReferenceOptions& options) {
  const SequenceBatch batch = make_batch(documents);
  ReferenceStep step;
  step.loss_tokens = batch.labels.ne(kIgnoreLabel).sum().item<std::int64_t>();
  MESHLOOM_CHECK_GT(step.loss_tokens, 0, "model.reference_step", "loss tokens of the step");
  const auto stat = values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  step.gradients = at::zeros({values.numel()}, values.options().dtype(stat));
  SingleRank rank(config, values, step.gradients);

  std::unique_ptr<BalanceLoss> balance;
  if (options.balance_coefficient != 0.0) {
    balance = make_balance_loss(options.balance_form, options.balance_coefficient, config);
  }
  if (balance != nullptr) {
    balance->load_state(options.balance_state);
    balance->begin_step(batch.size());
  }
  if (balance != nullptr && balance->needs_counting()) {
    SequenceBatch unlabelled = batch;  // counting needs no loss
    unlabelled.labels = at::full_like(batch.labels, kIgnoreLabel);
    StageContext counting = rank.context(unlabelled, false);
    counting.balance = balance.get();
    rank.stage().forward(counting, {});
    balance->finish_counting({});
  }

  StageContext context = rank.context(batch, true);
  context.balance = balance.get();
  context.loss_weight = 1.0 / static_cast<double>(step.loss_tokens);
  context.z_loss_weight = options.z_coefficient / static_cast<double>(batch.size());
  const StageOutput output = rank.stage().forward(context, {});
  rank.stage().backward(context, {});
  if (balance != nullptr) {
    step.balance_loss = balance->loss();
    balance->end_step({});
    step.balance_state = balance->state();
  }
  step.z_loss = output.z_loss_sum * context.z_loss_weight;
  step.loss = output.loss_sum * context.loss_weight + step.balance_loss + step.z_loss;
  return step;
}

}  // namespace meshloom::model
