#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"

namespace meshloom::parallel {

/// Ring attention over one unit of the HDP axis [BS 7, fig. 14]: keys and values travel around the
/// unit by grouped point-to-point on the parent communicator, the next block in flight while the
/// current one computes. Every document is cut into 2D chunks, member i holding chunks i and
/// 2D-1-i. One instance a micro-batch; collective over the unit.
class MESHLOOM_API RingExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it, in ring order; contains hdp.rank()
  RingExchange(comm::Communicator hdp, std::vector<int> ranks);

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;

  /// Time spent waiting for blocks that had not arrived, since construction.
  [[nodiscard]] std::chrono::nanoseconds waited() const { return waited_; }

 private:
  comm::Communicator hdp_;
  std::vector<int> ranks_;
  int index_ = 0;
  std::chrono::nanoseconds waited_{};
};

}  // namespace meshloom::parallel
