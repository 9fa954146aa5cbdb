#include "meshloom/parallel/exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/parallel/gather_exchange.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/ulysses_exchange.h"

namespace meshloom::parallel {
namespace {

/// Attention whose values have another head size than its keys, over an exchange that carries one
/// size: the narrower ones are widened with zeros, which changes no score and no value.
class EvenHeads final : public model::AttentionExchange {
 public:
  /// @param latents  whether the exchange moves latents where it is given them
  EvenHeads(std::unique_ptr<AttentionExchange> exchange, bool latents)
      : exchange_(std::move(exchange)), latents_(latents) {}

  model::AttentionOutput forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const model::SequenceBatch& batch,
                                 const model::AttentionOptions& options) override {
    if (k.size(2) == v.size(2)) return exchange_->forward(q, k, v, batch, options);
    const std::int64_t size = std::max(k.size(2), v.size(2));
    model::AttentionOutput wide =
        exchange_->forward(widen(q, size), widen(k, size), widen(v, size), batch, options);
    return {narrow(wide.out, v.size(2)), wide.lse};
  }

  model::AttentionGradients backward(const at::Tensor& dout, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     const model::AttentionOutput& forward,
                                     const model::SequenceBatch& batch,
                                     const model::AttentionOptions& options) override {
    if (k.size(2) == v.size(2)) {
      return exchange_->backward(dout, q, k, v, forward, batch, options);
    }
    const std::int64_t size = std::max(k.size(2), v.size(2));
    const model::AttentionGradients wide =
        exchange_->backward(widen(dout, size), widen(q, size), widen(k, size), widen(v, size),
                            {widen(forward.out, size), forward.lse}, batch, options);
    return {narrow(wide.dq, q.size(2)), narrow(wide.dk, k.size(2)), narrow(wide.dv, v.size(2))};
  }

  model::AttentionOutput forward_latent(const at::Tensor& q, const model::LatentKeys& keys,
                                        const model::SequenceBatch& batch,
                                        const model::AttentionOptions& options) override {
    return latents_ ? exchange_->forward_latent(q, keys, batch, options)
                    : AttentionExchange::forward_latent(q, keys, batch, options);
  }

  model::LatentGradients backward_latent(const at::Tensor& dout, const at::Tensor& q,
                                         model::LatentKeys& keys,
                                         const model::AttentionOutput& forward,
                                         const model::SequenceBatch& batch,
                                         const model::AttentionOptions& options) override {
    return latents_ ? exchange_->backward_latent(dout, q, keys, forward, batch, options)
                    : AttentionExchange::backward_latent(dout, q, keys, forward, batch, options);
  }

 private:
  static at::Tensor widen(const at::Tensor& x, std::int64_t size) {
    return x.size(2) == size ? x : at::constant_pad_nd(x, {0, size - x.size(2)});
  }
  static at::Tensor narrow(const at::Tensor& x, std::int64_t size) {
    return x.size(2) == size ? x : x.narrow(2, 0, size).contiguous();
  }

  std::unique_ptr<AttentionExchange> exchange_;
  bool latents_;
};

std::unique_ptr<model::AttentionExchange> make_one_size(const comm::Communicator& hdp,
                                                        const plan::Unit& unit, SpanSink spans,
                                                        std::shared_ptr<ExchangeBuffers> buffers,
                                                        ExchangeOptions options) {
  const auto degree = static_cast<int>(unit.ranks.size());
  switch (unit.exchange) {
    case plan::Exchange::kLocal:
      return std::make_unique<model::LocalAttention>();
    case plan::Exchange::kRing:
      return std::make_unique<RingExchange>(hdp, unit.ranks, std::move(spans), std::move(buffers),
                                            options);
    case plan::Exchange::kAllGather:
      return std::make_unique<GatherExchange>(hdp, unit.ranks, std::move(spans), std::move(buffers),
                                              options);
    case plan::Exchange::kUlysses:
      return std::make_unique<UlyssesExchange>(hdp, unit.ranks, degree, std::move(spans),
                                               std::move(buffers), options);
    case plan::Exchange::kRingUlysses:
      return std::make_unique<UlyssesExchange>(hdp, unit.ranks, unit.ulysses_degree,
                                               std::move(spans), std::move(buffers), options);
  }
  throw InvalidArgument("parallel.make_exchange", "the unit names no exchange");
}

std::unique_ptr<model::AttentionExchange> make(const comm::Communicator& hdp,
                                               const plan::Unit& unit, SpanSink spans,
                                               std::shared_ptr<ExchangeBuffers> buffers,
                                               ExchangeOptions options) {
  auto exchange = make_one_size(hdp, unit, std::move(spans), std::move(buffers), options);
  if (unit.exchange == plan::Exchange::kLocal) return exchange;
  return std::make_unique<EvenHeads>(std::move(exchange),
                                     unit.exchange == plan::Exchange::kAllGather);
}

}  // namespace

std::unique_ptr<model::AttentionExchange> make_exchange(const comm::Communicator& hdp,
                                                        const plan::Unit& unit, SpanSink spans,
                                                        std::shared_ptr<ExchangeBuffers> buffers) {
  return make(hdp, unit, std::move(spans), std::move(buffers), {});
}

ExchangeFactory make_exchange_factory(ExchangeOptions options) {
  return [options](const comm::Communicator& hdp, const plan::Unit& unit, SpanSink spans,
                   std::shared_ptr<ExchangeBuffers> buffers) {
    return make(hdp, unit, std::move(spans), std::move(buffers), options);
  };
}

}  // namespace meshloom::parallel
