#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/balance/model.h"

namespace meshloom::plan::balance {

/// An idle stretch of one rank: in front of a waiting unit, or after the rank's last one.
struct Gap {
  int rank = 0;
  double space = 0.0;  ///< time up to the unit, or to the target
  double left = 0.0;   ///< of that, what its items do not take
  std::int64_t tokens = 0;
  std::vector<int> items;
};

/// Moves items between gaps so that they need fewer units, each of which costs `fixed`, and end
/// level. The first `inner` gaps are in front of waiting units and are never overfilled. Does
/// nothing where units cost nothing. Deterministic: the effort is counted in steps.
void consolidate_(const Model& model, std::span<Gap> gaps, std::size_t inner, double target);

}  // namespace meshloom::plan::balance
