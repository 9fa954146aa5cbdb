#include <ATen/core/Tensor.h>

#include <utility>

#include "meshloom/model/activation_store.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/model/parameters.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/model/stage.h"
#include "meshloom/model/token_dispatcher.h"

// The virtual tables of the seams live here.
namespace meshloom::model {

ActivationStore::~ActivationStore() = default;
AttentionExchange::~AttentionExchange() = default;
LatentKeys::~LatentKeys() = default;

AttentionOutput AttentionExchange::forward_latent(const at::Tensor& q, const LatentKeys& keys,
                                                  const SequenceBatch& batch,
                                                  const AttentionOptions& options) {
  const KeysAndValues own = keys.expand(keys.rows());
  return forward(q, own.k, own.v, batch, options);
}

LatentGradients AttentionExchange::backward_latent(const at::Tensor& dout, const at::Tensor& q,
                                                   LatentKeys& keys, const AttentionOutput& forward,
                                                   const SequenceBatch& batch,
                                                   const AttentionOptions& options) {
  AttentionGradients gradients;
  {
    const KeysAndValues own = keys.expand(keys.rows());
    gradients = backward(dout, q, own.k, own.v, forward, batch, options);
  }
  return {std::move(gradients.dq), keys.contract(keys.rows(), gradients.dk, gradients.dv)};
}
ParameterSource::~ParameterSource() = default;
RouterBalance::~RouterBalance() = default;
ShardedLinear::~ShardedLinear() = default;
Stage::~Stage() = default;
TokenDispatcher::~TokenDispatcher() = default;
WeightGradSink::~WeightGradSink() = default;

void ActivationStore::layer_done(std::int64_t /*layer*/) {}

Arrival<DispatchedTokens> TokenDispatcher::begin_dispatch(const at::Tensor& x,
                                                          const at::Tensor& experts,
                                                          ExpertLayer of) {
  return [result = dispatch(x, experts, of)] { return result; };
}

Arrival<CombineGradients> TokenDispatcher::begin_combine_backward(const at::Tensor& dout,
                                                                  const DispatchedTokens& routing,
                                                                  const at::Tensor& weights) {
  return [result = combine_backward(dout, routing, weights)] { return result; };
}

}  // namespace meshloom::model
