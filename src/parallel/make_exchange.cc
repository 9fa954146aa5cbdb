#include "meshloom/parallel/exchange.h"

#include <fmt/format.h>

#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/parallel/gather_exchange.h"
#include "meshloom/parallel/ring_exchange.h"
#include "meshloom/parallel/ulysses_exchange.h"

namespace meshloom::parallel {

std::unique_ptr<model::AttentionExchange> make_exchange(const comm::Communicator& hdp,
                                                        const plan::Unit& unit, SpanSink spans,
                                                        std::shared_ptr<ExchangeBuffers> buffers) {
  switch (unit.exchange) {
    case plan::Exchange::kLocal:
      return std::make_unique<model::LocalAttention>();
    case plan::Exchange::kRing:
      return std::make_unique<RingExchange>(hdp, unit.ranks, std::move(spans), std::move(buffers));
    case plan::Exchange::kAllGather:
      return std::make_unique<GatherExchange>(hdp, unit.ranks, std::move(spans));
    case plan::Exchange::kUlysses:
      return std::make_unique<UlyssesExchange>(hdp, unit.ranks, std::move(spans));
    default:
      throw NotSupported(
          "parallel.make_exchange",
          fmt::format("exchange \"{}\" is not built; built are ring, all_gather and ulysses",
                      plan::to_string(unit.exchange)));
  }
}

}  // namespace meshloom::parallel
