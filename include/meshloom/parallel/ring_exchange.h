#pragma once

#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange_buffers.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

namespace detail {
class RingEngine;
}

/// Ring attention over one unit of the HDP axis [BS 7, fig. 14]: keys and values travel around the
/// unit by grouped point-to-point on the parent communicator, the next block in flight while the
/// current one computes; in backward their gradients follow one step behind. Rows go no further
/// than to who attends to them (`plan/exchange_route.h`). Every document is cut into 2D chunks,
/// member i holding chunks i and 2D-1-i. One instance a micro-batch; all ranks of the unit make the
/// same calls.
///
/// A failed exchange leaves the communicator aborted.
class MESHLOOM_API RingExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it, in ring order; contains hdp.rank()
  /// @param spans  told of every transfer and every wait; may be empty
  /// @param buffers  shared with the rank's other exchanges; none: its own
  RingExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans = {},
               std::shared_ptr<ExchangeBuffers> buffers = {}, ExchangeOptions options = {});
  ~RingExchange() override;

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;

 private:
  std::unique_ptr<detail::RingEngine> engine_;
};

}  // namespace meshloom::parallel
