#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <span>

#include "meshloom/comm/communicator.h"

namespace meshloom::comm::detail {

/// True for the dtypes that a communicator carries.
[[nodiscard]] bool is_supported(c10::ScalarType type);

/// destination[d][i] = sources[0][i] op sources[1][i] op ... for i in [begin, end), always in this
/// order. bf16 and fp16 accumulate in fp32 and round once; NaN wins every maximum and minimum.
/// Destinations may be sources: every element is read from all before it is written to any.
/// @param sources, destinations  arrays of `type`; at least one of each.
void reduce_range(c10::ScalarType type, ReduceOp op, std::span<const void* const> sources,
                  std::span<void* const> destinations, std::int64_t begin, std::int64_t end);

}  // namespace meshloom::comm::detail
