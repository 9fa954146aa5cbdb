#pragma once

#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange_buffers.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

/// Attention over one unit by exchanging heads for tokens (DeepSpeed-Ulysses), alone or with rings.
///
/// The unit's D = U * R members form R head groups of U neighbours. In a group member u gets query
/// heads [floor(u Hq / U), floor((u + 1) Hq / U)) of the group's tokens and the K/V heads they
/// read, and sends its heads' outputs back. The tokens of group g are chunks g and 2R-1-g of 2R, so
/// the members with the same heads form a ring of R, which is RingExchange's. With U = D
/// (`ulysses`) there is one group with whole documents and no ring.
///
/// Works where U does not divide the heads, where K/V heads are fewer than members (a K/V head then
/// goes to every member that reads it, and its gradients are summed in member order), and where U
/// exceeds the query heads (some members then only pass tokens on). Backward sends queries, keys,
/// values and the output's gradient again.
///
/// One instance a micro-batch; all ranks of the unit make the same calls. A failed exchange leaves
/// the communicator aborted.
class MESHLOOM_API UlyssesExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it; contains hdp.rank()
  /// @param group  U, a divisor of the number of ranks
  /// @param spans  told of every transfer and every wait; may be empty
  /// @param buffers  shared with the rank's other exchanges; none: its own
  /// @throws InvalidArgument  `group` is no divisor, or the rank is not in the unit.
  UlyssesExchange(comm::Communicator hdp, std::vector<int> ranks, int group, SpanSink spans = {},
                  std::shared_ptr<ExchangeBuffers> buffers = {}, ExchangeOptions options = {});
  ~UlyssesExchange() override;

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::parallel
