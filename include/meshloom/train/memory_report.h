#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/memory_changes.h"
#include "meshloom/plan/memory_forecast.h"

namespace meshloom::train {

/// What a run is expected to take of its machines, before it takes it. Bytes; equal on all ranks.
struct MESHLOOM_API MemoryReport {
  plan::MemorySetting setting;
  plan::StepLimits limits;
  /// A rank of each pipeline stage in the fullest step that the config allows, [pp].
  std::vector<plan::MemoryForecast> stages;
  /// What the processes held before anything was built, by world rank; ranks of one process share
  /// it evenly.
  std::vector<std::int64_t> baseline;
  /// Memory that ranks share, the fullest of it: a host's, or one device.
  struct Room {
    std::string name;
    int ranks = 0;
    std::int64_t needed = 0;  ///< tensors at their peak, and on a host the processes beside them
    std::int64_t states = 0;  ///< of that, what is held whatever the data is
    std::int64_t has = 0;     ///< 0: unknown
  };
  Room room;
  /// Where `needed` is more than there is: settings with which it is not.
  std::vector<plan::MemoryChange> changes;

  [[nodiscard]] const plan::MemoryForecast& fullest() const;
  [[nodiscard]] bool fits() const { return room.has == 0 || room.needed <= room.has; }
  /// A short table: parts of the fullest rank, what there is, and what to change.
  [[nodiscard]] std::string text() const;
};

}  // namespace meshloom::train
