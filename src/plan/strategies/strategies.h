#pragma once

#include <memory>

#include "meshloom/plan/strategy.h"

/// Factories of the built-in strategies, one per source file; `make_strategy_registry` names them.
namespace meshloom::plan {

[[nodiscard]] std::shared_ptr<BalanceStrategy> make_static();
[[nodiscard]] std::shared_ptr<BalanceStrategy> make_naive_hdp();
[[nodiscard]] std::shared_ptr<BalanceStrategy> make_balanced();
[[nodiscard]] std::shared_ptr<BalanceStrategy> make_bytescale();
[[nodiscard]] std::shared_ptr<BalanceStrategy> make_exact();

}  // namespace meshloom::plan
