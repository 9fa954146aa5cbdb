#pragma once

#include <ATen/core/Tensor.h>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/plan/step_plan.h"

/// Counts of routing over ranks.
namespace meshloom::parallel::detail {

/// Adds `counts` over the ranks of a unit: every member sends to every other and adds in ring
/// order, so that all have the same sum.
void sum_over_unit_(comm::Communicator& hdp, const plan::Unit& unit, at::Tensor& counts);

/// Counts routing on its way to the balance loss.
class RoutingCounter final : public model::RouterBalance {
 public:
  /// @param balance  may be null
  /// @param counts   [layers, experts], added to; undefined: nothing is counted
  RoutingCounter(model::RouterBalance* balance, at::Tensor& counts)
      : balance_(balance), counts_(counts) {}
  at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                     const model::SequenceBatch& batch) override;

 private:
  model::RouterBalance* balance_;
  at::Tensor& counts_;
};

}  // namespace meshloom::parallel::detail
