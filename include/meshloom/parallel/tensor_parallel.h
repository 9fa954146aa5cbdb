#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

/// Weights split over a tensor-parallel group, the residual stream by tokens [Shoeybi et al. 2019;
/// Korthikanti et al. 2022]: rank r of n holds rows [floor(T r / n), floor(T (r + 1) / n)). Rows
/// are gathered for a `column` product while the own ones are multiplied; partial sums of a `row`
/// product are scattered, of long batches in two pieces, the first while the second is made; in
/// backward the gathering of x runs beside dy W, and the scattering of that beside the weight's
/// gradient. The head's softmax is taken over vocabulary parts: a chunk of logits meets the others'
/// maxima and sums, never their logits.
class MESHLOOM_API TensorParallel final : public model::ShardedLinear {
 public:
  /// @param tokens      T of the micro-batch
  /// @param vocabulary  of the whole model
  TensorParallel(comm::Communicator group, std::int64_t tokens, std::int64_t vocabulary,
                 SpanSink spans = {});

  [[nodiscard]] plan::TokenRange own_rows(std::int64_t tokens) const override;
  at::Tensor column(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  at::Tensor column_backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& x,
                             const WeightGradient& add) override;
  at::Tensor row(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) override;
  RowGradients row_backward(const at::Tensor& dy, const at::Tensor& weight) override;
  at::Tensor all_rows(const at::Tensor& x) override;
  at::Tensor all_rows_backward(const at::Tensor& partial) override;
  at::Tensor embedding(const at::Tensor& tokens, const at::Tensor& weight) override;
  void embedding_backward(
      const at::Tensor& tokens, const at::Tensor& dy,
      const std::function<void(const at::Tensor& ids, const at::Tensor& rows)>& add) override;
  model::ops::CrossEntropyOutput cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                               const at::Tensor& labels, double loss_weight,
                                               const model::ops::LogitGradientSink* add) override;

 private:
  [[nodiscard]] comm::Work gather(const at::Tensor& rows);
  [[nodiscard]] comm::Work scatter(const at::Tensor& partial);
  [[nodiscard]] at::Tensor finish(comm::Work work) const;
  using RowProduct = std::function<void(at::Tensor& part, const at::Tensor& rows)>;
  /// Multiplies the rows of all ranks, the own ones while the others travel.
  /// @param width     columns of the product
  /// @param multiply  writes the product of some rows
  /// @returns product and rows, [tokens, ...]
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> gathered_product(const at::Tensor& x,
                                                                   std::int64_t width,
                                                                   const RowProduct& multiply);
  /// Positions of the tokens of the own part of the vocabulary, and their ids within it.
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> own_tokens(const at::Tensor& tokens) const;
  /// Log-sum-exp over the whole vocabulary and the label's logit, [n] each, from own parts.
  void merge(at::Tensor& lse, at::Tensor& target);
  /// x w^T, of whose sums over ranks each keeps its rows; those of one piece travel while the next
  /// is multiplied.
  [[nodiscard]] at::Tensor scattered_product(const at::Tensor& x, const at::Tensor& weight);

  comm::Communicator group_;
  std::vector<std::int64_t> rows_;  ///< of each rank
  std::int64_t first_token_id_;     ///< of the own part of the vocabulary
  std::int64_t last_token_id_;
  SpanSink spans_;
};

/// The documents of some rows of a batch: what a rank holds of the residual stream.
/// @returns a batch of `documents` alone
[[nodiscard]] MESHLOOM_API model::SequenceBatch stream_of(const model::SequenceBatch& batch,
                                                          plan::TokenRange rows);

}  // namespace meshloom::parallel
