#pragma once

#include <functional>
#include <memory>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange_buffers.h"
#include "meshloom/parallel/span.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::parallel {

/// Makes the attention exchange of one micro-batch. `buffers` are the executor's, shared by all its
/// micro-batches.
using ExchangeFactory = std::function<std::unique_ptr<model::AttentionExchange>(
    const comm::Communicator& hdp, const plan::Unit& unit, SpanSink spans,
    std::shared_ptr<ExchangeBuffers> buffers)>;

/// The exchange that the unit names: the factory that executors use by default.
/// @throws InvalidArgument  this rank is not in the unit, or its ulysses_degree no divisor.
[[nodiscard]] MESHLOOM_API std::unique_ptr<model::AttentionExchange> make_exchange(
    const comm::Communicator& hdp, const plan::Unit& unit, SpanSink spans,
    std::shared_ptr<ExchangeBuffers> buffers = {});

/// The same with options.
[[nodiscard]] MESHLOOM_API ExchangeFactory make_exchange_factory(ExchangeOptions options);

}  // namespace meshloom::parallel
