#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/train/config.h"
#include "meshloom/train/memory_report.h"
#include "train/internal/setup.h"

namespace meshloom::train::detail {

/// What of this process's memory is a rank's.
struct OwnMemory {
  std::int64_t before = 0;  ///< bytes without pages of files, before anything was built
  int sharing = 1;          ///< ranks that live in the process
};

struct MemoryOutlook {
  MemoryReport report;  ///< the same on all ranks
  OwnMemory own;
};

/// What a resolved config will take. Call it before anything is built. Collective.
[[nodiscard]] MemoryOutlook report_memory(comm::Communicator& world, const Hosts& hosts,
                                          const parallel::ModelPlacement& placement,
                                          const TrainConfig& config, const c10::Device& device);

/// @throws InvalidArgument  memory_check says so: under `refuse` the report does not fit, under
///   `auto` not even the states do. On all ranks alike.
MESHLOOM_API void check_memory(const MemoryReport& report, const std::string& policy);

/// Most bytes of this rank's device that tensors took, or that its process took beyond
/// `own`; ranks of one process share it evenly. Where something larger ran in the process before,
/// that is its peak.
[[nodiscard]] std::int64_t measured_peak(const c10::Device& device, const OwnMemory& own);

/// What was predicted for every rank, beside what it took.
/// @param measured  bytes, by world rank
[[nodiscard]] std::string memory_json(const MemoryReport& report, const Layout& layout,
                                      const std::vector<double>& measured);

}  // namespace meshloom::train::detail
