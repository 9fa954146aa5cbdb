#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// Puts units into slots in the order given: each into the first slot after all slots that its
/// ranks are already in, so that every rank meets its units in the order they were added.
class SlotBuilder {
 public:
  explicit SlotBuilder(int hdp) : next_slot_(static_cast<std::size_t>(hdp), 0) {}

  void add(Unit unit) {
    std::size_t slot = 0;
    for (const int rank : unit.ranks) slot = std::max(slot, next_slot_[rank]);
    for (const int rank : unit.ranks) next_slot_[rank] = slot + 1;
    if (slots_.size() <= slot) slots_.resize(slot + 1);
    slots_[slot].units.push_back(std::move(unit));
  }

  [[nodiscard]] std::vector<Slot> take() && { return std::move(slots_); }

 private:
  std::vector<std::size_t> next_slot_;
  std::vector<Slot> slots_;
};

}  // namespace meshloom::plan
