#pragma once

#include "meshloom/plan/schedule.h"

namespace meshloom::plan::detail {

/// Zero-bubble schedule over two chunks a stage in a V: stage i holds pieces i and 2p-1-i, so loss
/// and embedding share a stage [Qi et al. 2024].
Schedule zero_bubble_v(int stages, int slots);

}  // namespace meshloom::plan::detail
