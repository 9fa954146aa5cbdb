#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "meshloom/core/export.h"
#include "meshloom/model/ops.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::model {

/// The products whose weights may be split over the ranks of a tensor-parallel group. Between them
/// the residual stream is split by tokens: of T tokens each rank holds `own_rows(T)` (sequence
/// parallelism), so norms and routers see those rows only. `column`: output features are split, the
/// stream's rows are gathered first; `row`: input features are split, partial sums come back as
/// rows. Embedding and head are split by vocabulary. The default is a single rank that holds all.
/// An instance belongs to one micro-batch; its ranks call it in the same order, backward included.
class MESHLOOM_API ShardedLinear {
 public:
  /// Takes the gathered operand of a weight gradient, once, at whatever point suits the transfers.
  using WeightGradient = std::function<void(const at::Tensor& all_rows)>;
  struct RowGradients {
    at::Tensor dx;  ///< [T, own in]
    at::Tensor dy;  ///< [T, out]: of all tokens, for the weight's gradient
  };

  virtual ~ShardedLinear();

  /// Rows of the stream that this rank holds of a micro-batch.
  [[nodiscard]] virtual plan::TokenRange own_rows(std::int64_t tokens) const = 0;

  /// @param x  [own rows, in] @param weight  [own out, in] @param bias  [own out] or undefined
  /// @returns [T, own out]
  virtual at::Tensor column(const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias) = 0;
  /// @param dy  [T, own out] @param x  what `column` was given
  /// @returns [own rows, in]
  virtual at::Tensor column_backward(const at::Tensor& dy, const at::Tensor& weight,
                                     const at::Tensor& x, const WeightGradient& add) = 0;
  /// @param x  [T, own in] @param weight  [out, own in] @param bias  [out] or undefined
  /// @returns [own rows, out]
  virtual at::Tensor row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) = 0;
  /// @param dy  [own rows, out]
  virtual RowGradients row_backward(const at::Tensor& dy, const at::Tensor& weight) = 0;

  /// What all of T tokens need of the own rows. @param x  [own rows, n] @returns [T, n]
  virtual at::Tensor all_rows(const at::Tensor& x) = 0;
  /// Its gradient: the sum over ranks. @param partial  [T, n] @returns [own rows, n]
  virtual at::Tensor all_rows_backward(const at::Tensor& partial) = 0;

  /// @param tokens  int64 [T] @param weight  [own vocabulary, hidden] @returns [own rows, hidden]
  virtual at::Tensor embedding(const at::Tensor& tokens, const at::Tensor& weight) = 0;
  /// Hands `add` the tokens of the own vocabulary, counted from its begin, and their rows.
  /// @param dy  [own rows, hidden]
  virtual void embedding_backward(
      const at::Tensor& tokens, const at::Tensor& dy,
      const std::function<void(const at::Tensor& ids, const at::Tensor& rows)>& add) = 0;
  /// @param hidden  [own rows, hidden] @param weight  [own vocabulary, hidden] @param labels  [T]
  /// @param add  null: the loss alone
  /// @returns the loss over all T tokens, on every rank; dhidden [own rows, hidden]
  virtual ops::CrossEntropyOutput cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                const at::Tensor& labels, double loss_weight,
                                                const ops::LogitGradientSink* add) = 0;
};

class MESHLOOM_API LocalLinear final : public ShardedLinear {
 public:
  [[nodiscard]] plan::TokenRange own_rows(std::int64_t tokens) const override {
    return {0, tokens};
  }
  at::Tensor column(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  at::Tensor column_backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& x,
                             const WeightGradient& add) override;
  at::Tensor row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  RowGradients row_backward(const at::Tensor& dy, const at::Tensor& weight) override;
  at::Tensor all_rows(const at::Tensor& x) override { return x; }
  at::Tensor all_rows_backward(const at::Tensor& partial) override { return partial; }
  at::Tensor embedding(const at::Tensor& tokens, const at::Tensor& weight) override;
  void embedding_backward(
      const at::Tensor& tokens, const at::Tensor& dy,
      const std::function<void(const at::Tensor& ids, const at::Tensor& rows)>& add) override;
  ops::CrossEntropyOutput cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                        const at::Tensor& labels, double loss_weight,
                                        const ops::LogitGradientSink* add) override;
};

}  // namespace meshloom::model
