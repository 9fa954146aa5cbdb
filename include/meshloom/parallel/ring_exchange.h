#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/span.h"

namespace meshloom::parallel {
namespace detail {
struct KeyValues;
}

/// Transfer buffers that exchanges of one rank take turns with, so that a steady state allocates
/// nothing: each grows to the largest use and stays. Not thread safe.
class MESHLOOM_API ExchangeBuffers {
 public:
  /// Uninitialised; valid until the next call with this index. @param index  below 5
  at::Tensor take(std::size_t index, at::IntArrayRef sizes, const at::TensorOptions& options);

 private:
  std::array<at::Tensor, 5> buffers_;
};

/// Ring attention over one unit of the HDP axis [BS 7, fig. 14]: keys and values travel around the
/// unit by grouped point-to-point on the parent communicator, the next block in flight while the
/// current one computes; in backward their gradients follow one step behind and end at home. Every
/// document is cut into 2D chunks, member i holding chunks i and 2D-1-i. One instance a
/// micro-batch; all ranks of the unit make the same calls.
///
/// A failed exchange leaves the communicator aborted.
class MESHLOOM_API RingExchange final : public model::AttentionExchange {
 public:
  /// @param hdp    communicator over the HDP axis
  /// @param ranks  the unit's ranks on it, in ring order; contains hdp.rank()
  /// @param spans  told of every transfer and every wait; may be empty
  /// @param buffers  shared with the rank's other exchanges; none: its own
  RingExchange(comm::Communicator hdp, std::vector<int> ranks, SpanSink spans = {},
               std::shared_ptr<ExchangeBuffers> buffers = {});

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override;
  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override;

 private:
  [[nodiscard]] int degree() const { return static_cast<int>(ranks_.size()); }
  /// Keys and values of some rows in a buffer. @param k, v  with heads of the same sizes
  [[nodiscard]] detail::KeyValues take(std::size_t buffer, std::int64_t rows, const at::Tensor& k,
                                       const at::Tensor& v, const at::TensorOptions& options);
  /// Own keys and values in the first block buffer.
  [[nodiscard]] detail::KeyValues pack(const at::Tensor& k, const at::Tensor& v);

  comm::Communicator hdp_;
  std::vector<int> ranks_;
  int index_ = 0;
  SpanSink spans_;
  std::shared_ptr<ExchangeBuffers> buffers_;
};

}  // namespace meshloom::parallel
