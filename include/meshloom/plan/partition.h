#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::plan {

/// Partitions of costs into parts of nearly equal sums: encoder inputs over ranks, rollouts over
/// micro-batches. A partition lists, for each part, the indices of its costs, ascending.
using Partition = std::vector<std::vector<std::size_t>>;

enum class PartitionMethod : std::uint8_t {
  kLongestFirst,   ///< longest-processing-time: each cost, largest first, to the smallest sum
  kKarmarkarKarp,  ///< largest differencing: merges the two most uneven partial partitions
};

/// @param costs        finite and not negative; may be empty or fewer than `parts`.
/// @param parts        >= 1.
/// @param equal_sizes  parts hold equally many costs (one more in some where they do not divide).
/// @throws InvalidArgument  names the argument.
[[nodiscard]] MESHLOOM_API Partition partition(std::span<const double> costs, int parts,
                                               PartitionMethod method, bool equal_sizes = false);

/// The same inside locality groups: cost i stays in group `group_of[i]`, whose parts are
/// `group * parts_per_group` up to the next group's.
/// @throws InvalidArgument  sizes differ, or a group is outside 0 .. groups-1.
[[nodiscard]] MESHLOOM_API Partition partition_in_groups(std::span<const double> costs,
                                                         std::span<const int> group_of, int groups,
                                                         int parts_per_group,
                                                         PartitionMethod method,
                                                         bool equal_sizes = false);

/// Largest sum over the mean sum; 1 is level. 1 where all costs are zero.
[[nodiscard]] MESHLOOM_API double imbalance(std::span<const double> costs,
                                            const Partition& partition);

}  // namespace meshloom::plan
