#pragma once

#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

/// Attention over one unit by exchanging heads for tokens (DeepSpeed-Ulysses): member m gets query
/// heads [floor(m Hq / D), floor((m + 1) Hq / D)) of all tokens and the K/V heads they read,
/// attends to whole documents, and sends its heads' outputs back. Works where D does not divide the
/// heads, where K/V heads are fewer than ranks (a K/V head then goes to every member that reads it,
/// and its gradients are summed in member order), and where D exceeds the query heads (some members
/// then only pass tokens on). Backward sends queries, keys, values and the output's gradient again.
///
/// One instance a micro-batch; all ranks of the unit make the same calls. A failed exchange leaves
/// the communicator aborted.
class MESHLOOM_API UlyssesExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it; contains hdp.rank()
  /// @param spans  told of every transfer and every wait; may be empty
  UlyssesExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans = {});

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;

 private:
  struct Heads;
  struct WholeDocuments;
  [[nodiscard]] int degree() const { return static_cast<int>(ranks_.size()); }
  [[nodiscard]] Heads heads_of(int member, const at::Tensor& q, const at::Tensor& k) const;
  [[nodiscard]] const WholeDocuments& whole_documents(const model::SequenceBatch& batch,
                                                      const at::Device& device);
  /// Sends tensor m to member m and fills those received, [rows of member, ...], own one included.
  void all_to_all(const std::vector<at::Tensor>& to, std::vector<at::Tensor>& from);

  comm::Communicator hdp_;
  std::vector<int> ranks_;
  int index_ = 0;
  SpanSink spans_;
  std::shared_ptr<const WholeDocuments> whole_;  ///< of the micro-batch; made by the first call
};

}  // namespace meshloom::parallel
