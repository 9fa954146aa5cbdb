#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/model/attention_kernel.h"
#include "meshloom/plan/exchange_route.h"
#include "parallel/internal/unit_exchange.h"

namespace meshloom::parallel::detail {

/// A route and what follows from it on tensors, for one window of a micro-batch.
struct RoutedSteps {
  RoutedSteps(const model::SequenceBatch& batch, int degree, int index, std::int64_t window,
              bool relay, const at::Device& device);

  plan::ExchangeRoute route;
  std::vector<std::vector<model::AttentionBlock>> blocks;  ///< [step]; of step 0 the own keys
  /// Those of step 0 in two parts of equal work: backward computes one while the first keys come
  /// and the other while the last gradients go home.
  std::vector<model::AttentionBlock> own_first;
  std::vector<model::AttentionBlock> own_last;
  std::vector<RowMap> direct;  ///< [step], as the route's
  std::vector<RowMap> returned;
  std::vector<RowMap> forward;
  std::vector<RowMap> home;
};

/// The routes of one micro-batch, made once for each window that its layers have.
class RoutedBatch {
 public:
  RoutedBatch(int degree, int index, bool relay) : degree_(degree), index_(index), relay_(relay) {}
  const RoutedSteps& of(const model::SequenceBatch& batch, std::int64_t window,
                        const at::Device& device);

 private:
  int degree_;
  int index_;
  bool relay_;
  std::map<std::int64_t, RoutedSteps> by_window_;
};

/// Ring attention on accumulators that the caller owns: what `ring` and the rings of
/// `ring_ulysses` do. A ring of one attends to its own keys and sends nothing.
class RingEngine {
 public:
  /// @param ranks  of the ring, on the axis of `hdp` @param index  own position in it
  RingEngine(comm::Communicator hdp, std::vector<int> ranks, int index, SpanSink spans,
             std::shared_ptr<ExchangeBuffers> buffers, ExchangeOptions exchange);

  /// Merges attention over the whole documents into out [T, Hq, D] and lse [Hq, T].
  void forward_(at::Tensor& out, at::Tensor& lse, const at::Tensor& q, const at::Tensor& k,
                const at::Tensor& v, const model::SequenceBatch& batch,
                const model::AttentionOptions& options, std::span<const HeadRun> runs);

  /// Adds gradients, in the dtype of lse, to dq, dk and dv.
  void backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                 const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& lse, const at::Tensor& delta, const model::SequenceBatch& batch,
                 const model::AttentionOptions& options, std::span<const HeadRun> runs);

 private:
  [[nodiscard]] int degree() const { return static_cast<int>(ranks_.size()); }
  [[nodiscard]] int rank_at(int distance) const {
    return ranks_[static_cast<std::size_t>((index_ + distance + 2 * degree()) % degree())];
  }
  /// Puts the keys and values of step `step` + 1 on their way. @returns where they arrive.
  at::Tensor move_keys(Parcel& parcel, const RoutedSteps& routed, int step, const at::Tensor& held,
                       const at::Tensor& k, const at::Tensor& v);
  /// Sends the finished gradient of step `step` on or home.
  void move_gradient(Parcel& parcel, const RoutedSteps& routed, int step,
                     const at::Tensor& gradient);
  /// The block in the dtype of computation.
  [[nodiscard]] at::Tensor computable(const at::Tensor& held, const at::Tensor& k);

  comm::Communicator hdp_;
  std::vector<int> ranks_;
  int index_;
  SpanSink spans_;
  std::shared_ptr<ExchangeBuffers> buffers_;
  ExchangeOptions exchange_;
  RoutedBatch routes_;
};

}  // namespace meshloom::parallel::detail
