#include "parallel/internal/routing_sums.h"

#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>

#include <cstddef>
#include <iterator>
#include <vector>

namespace meshloom::parallel::detail {

void sum_over_unit_(comm::Communicator& hdp, const plan::Unit& unit, at::Tensor& counts) {
  const at::Tensor own = counts.contiguous();
  at::Tensor parts = at::empty({std::ssize(unit.ranks), own.numel()}, own.options());
  std::vector<at::Tensor> received;
  std::vector<comm::Transfer> sends;
  std::vector<comm::Transfer> receives;
  received.reserve(unit.ranks.size());
  for (std::size_t i = 0; i < unit.ranks.size(); ++i) {
    received.push_back(parts[static_cast<std::int64_t>(i)].view(own.sizes()));
    if (unit.ranks[i] == hdp.rank()) {
      received.back().copy_(own);
      continue;
    }
    sends.push_back({.peer = unit.ranks[i], .tensor = &own});
    receives.push_back({.peer = unit.ranks[i], .tensor = &received.back()});
  }
  hdp.send_receive(sends, receives, {.timeout = std::nullopt, .purpose = "balance"}).wait();
  counts.zero_();
  for (const at::Tensor& part : received) counts.add_(part);
}

at::Tensor RoutingCounter::observe(int layer, const at::Tensor& probabilities,
                                   const at::Tensor& experts, const model::SequenceBatch& batch) {
  if (counts_.defined()) {
    counts_[layer].add_(at::bincount(experts.reshape({-1}), {}, counts_.size(1)));
  }
  if (balance_ == nullptr) return {};
  return balance_->observe(layer, probabilities, experts, batch);
}

}  // namespace meshloom::parallel::detail
