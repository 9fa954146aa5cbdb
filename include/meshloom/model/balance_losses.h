#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"
#include "meshloom/model/router_balance.h"

namespace meshloom::model {

/// What the balance losses have in common. Every form is coefficient * E * sum_e f_e P_e with f_e
/// the choices of expert e per token and P_e its mean probability, k at perfect balance; the forms
/// differ in what the means run over. All are linear in the probabilities, so ranks add up: the
/// gradient that `observe` returns is final, and the step's loss is the sum of `loss()` over ranks.
/// One instance belongs to one rank and lives across steps. Not thread safe.
class MESHLOOM_API BalanceLoss : public RouterBalance {
 public:
  /// Adds a tensor over ranks in place. Collective: all of them call in the same order.
  using Sum = std::function<void(at::Tensor& counts)>;

  /// @param moe_layers  of the whole model, on all stages.
  BalanceLoss(double coefficient, std::int64_t experts, std::int64_t moe_layers);
  ~BalanceLoss() override;

  /// Starts a step. @param tokens  of the whole step, on all ranks.
  virtual void begin_step(std::int64_t tokens);
  /// Ends it: `global_lagged` shares its counts here. Collective if `sum` is.
  virtual void end_step(const Sum& sum);
  /// This rank's part of the loss of the step so far, coefficient included.
  [[nodiscard]] double loss() const { return loss_; }
  /// Whether the step needs a pass of forwards without gradients before its first real one:
  /// begin_step, the pass, finish_counting, then the real micro-batches.
  [[nodiscard]] virtual bool needs_counting() const { return false; }
  /// @throws InvalidArgument  this form does not count.
  virtual void finish_counting(const Sum& sum);
  /// State to checkpoint, undefined if there is none, and back.
  [[nodiscard]] virtual at::Tensor state() const { return {}; }
  virtual void load_state(const at::Tensor& state);

 protected:
  /// loss += sum(gradient * probabilities), the loss being linear in the probabilities.
  void account(const at::Tensor& gradient, const at::Tensor& probabilities);
  [[nodiscard]] double scale() const;  ///< coefficient * E / (tokens * layers)

  double coefficient_;
  std::int64_t experts_;
  std::int64_t moe_layers_;
  std::int64_t tokens_ = 0;
  double loss_ = 0.0;
};

/// transformers' load_balancing_loss_func over the whole step: counts and probabilities of all
/// layers pooled, f_e = C_e / N and P_e = sum p_e / N with N = tokens * layers. The counts must be
/// known before the first gradient, hence the counting pass. For parity.
class MESHLOOM_API GlobalBalance final : public BalanceLoss {
 public:
  using BalanceLoss::BalanceLoss;
  void begin_step(std::int64_t tokens) override;
  [[nodiscard]] bool needs_counting() const override { return true; }
  void finish_counting(const Sum& sum) override;
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const SequenceBatch& batch) override;

 private:
  at::Tensor counts_;    ///< fp64 [E], while counting
  at::Tensor gradient_;  ///< fp64 [1, E], after it
};

/// Per layer, with f_e from the step before: no counting pass, no communication but [layers, E]
/// counts at the end of a step. The mean over layers. No gradient in the first step.
class MESHLOOM_API GlobalLaggedBalance final : public BalanceLoss {
 public:
  GlobalLaggedBalance(double coefficient, const ModelConfig& config);
  void begin_step(std::int64_t tokens) override;
  void end_step(const Sum& sum) override;
  [[nodiscard]] at::Tensor state() const override { return frequencies_; }
  void load_state(const at::Tensor& state) override;
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const SequenceBatch& batch) override;

 private:
  at::Tensor counts_;       ///< fp64 [layers, E], of this step on this rank
  at::Tensor frequencies_;  ///< fp64 [layers, E], of the last step; undefined before it
};

/// Per document and layer, exact under any plan; documents weigh by their tokens, the mean over
/// layers. Where documents are sliced over a unit, `set_unit_sum` supplies the sum over its ranks,
/// called once per MoE layer and forward with counts [documents, E].
class MESHLOOM_API SequenceBalance final : public BalanceLoss {
 public:
  using BalanceLoss::BalanceLoss;
  /// None (the default): every document is whole.
  void set_unit_sum(Sum sum) { unit_sum_ = std::move(sum); }
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const SequenceBatch& batch) override;

 private:
  Sum unit_sum_;
};

/// @param form  "none" (gives null), "global_lagged", "sequence" or "global"
/// With sigmoid scores the probabilities are scores over their sum and the coefficient is
/// DeepSeek's, for which perfect balance is 1: k times smaller than above.
/// @throws InvalidArgument  another name; a dense model with a form other than none.
[[nodiscard]] MESHLOOM_API std::unique_ptr<BalanceLoss> make_balance_loss(
    const std::string& form, double coefficient, const ModelConfig& config);

}  // namespace meshloom::model
