#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/exchange_choice.h"

namespace meshloom::plan::detail {

/// Every exchange that the unit may have, with its predicted time: ring, all_gather, ulysses, and
/// ring_ulysses with every head group between one and all members.
[[nodiscard]] std::vector<ExchangeCandidate> candidates(const ExchangeModel& model,
                                                        std::span<const std::int64_t> lengths,
                                                        std::span<const int> ranks);

/// Query-key pairs between tokens [queries) and [keys) of one document: keys not behind the query,
/// and in its window.
[[nodiscard]] MESHLOOM_API double pairs_between(std::int64_t query_begin, std::int64_t query_end,
                                                std::int64_t key_begin, std::int64_t key_end,
                                                std::int64_t window);

}  // namespace meshloom::plan::detail
