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
ParameterSource::~ParameterSource() = default;
RouterBalance::~RouterBalance() = default;
ShardedLinear::~ShardedLinear() = default;
Stage::~Stage() = default;
TokenDispatcher::~TokenDispatcher() = default;
WeightGradSink::~WeightGradSink() = default;

}  // namespace meshloom::model
