#include "meshloom/parallel/exchange.h"

#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/parallel/gather_exchange.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/ulysses_exchange.h"

namespace meshloom::parallel {
namespace {

std::unique_ptr<model::AttentionExchange> make(const comm::Communicator& hdp,
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
