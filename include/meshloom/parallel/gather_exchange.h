#pragma once

#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange_buffers.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

/// Attention over one unit with all keys and values gathered by one grouped call: every rank sends
/// to each of the others what that one attends to and computes on its own block meanwhile; in
/// backward it gathers again and sends every gradient home in one call. As many bytes as the ring
/// in fewer, larger steps, for the memory of all blocks at once: best where K/V heads are few and
/// groups small. Results are bit for bit the ring's forward, since blocks are merged in the same
/// order. Keys and values that are made from latents are made by who attends to them: the latents
/// travel, and a block's keys and values exist while it is worked on.
///
/// One instance a micro-batch; all ranks of the unit make the same calls. A failed exchange leaves
/// the communicator aborted.
class MESHLOOM_API GatherExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it; contains hdp.rank()
  /// @param spans  told of every transfer and every wait; may be empty
  /// @param buffers  shared with the rank's other exchanges; none: its own
  GatherExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans = {},
                 std::shared_ptr<ExchangeBuffers> buffers = {}, ExchangeOptions options = {});
  ~GatherExchange() override;

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;
  model::AttentionOutput forward_latent(const at::Tensor& q, const model::LatentKeys& keys,
                                        const model::SequenceBatch& batch,
                                        const model::AttentionOptions& options) override;
  model::LatentGradients backward_latent(const at::Tensor& dout, const at::Tensor& q,
                                         model::LatentKeys& keys,
                                         const model::AttentionOutput& forward,
                                         const model::SequenceBatch& batch,
                                         const model::AttentionOptions& options) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::parallel
