#pragma once

#include <vector>

#include "plan/balance/fill.h"
#include "plan/balance/model.h"
#include "plan/balance/placement.h"

namespace meshloom::plan::balance {

/// What the scheduler found: units in a global order, and their makespan.
struct Schedule {
  std::vector<Piece> pieces;
  double makespan = 0.0;
  double exchange = 0.0;  ///< sum of (D - 1) * tokens
};

/// Chooses degrees, ranks and order; may first merge short items into long ones (`share_units_`).
/// Deterministic: the effort is counted in steps, not seconds.
[[nodiscard]] Schedule search(Model& model);

}  // namespace meshloom::plan::balance
