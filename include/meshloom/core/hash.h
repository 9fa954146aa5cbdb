#pragma once

#include <cstdint>
#include <string_view>

#include "meshloom/core/export.h"

namespace meshloom {

/// XXH64 of a byte string, the same on every machine.
[[nodiscard]] MESHLOOM_API std::uint64_t hash_bytes(std::string_view bytes, std::uint64_t seed = 0);

}  // namespace meshloom
