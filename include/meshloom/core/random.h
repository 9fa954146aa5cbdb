#pragma once

#include <cstdint>
#include <string_view>

#include "meshloom/core/export.h"

namespace meshloom {

/// Counter-based random numbers: a value depends on (key, counter) alone, so any rank can make any
/// element of any tensor without drawing the ones before it. The mix is SplitMix64's finaliser
/// (Steele, Lea, Flood 2014), applied twice.
[[nodiscard]] MESHLOOM_API std::uint64_t random_bits(std::uint64_t key, std::uint64_t counter);

/// Key of a named stream, e.g. ("model.norm.weight", 1234).
[[nodiscard]] MESHLOOM_API std::uint64_t random_key(std::string_view name, std::uint64_t seed);

/// Uniform in [0, 1) with 53 bits.
[[nodiscard]] MESHLOOM_API double random_uniform(std::uint64_t key, std::uint64_t counter);

/// Standard normal (Box-Muller on counters 2c and 2c + 1).
[[nodiscard]] MESHLOOM_API double random_normal(std::uint64_t key, std::uint64_t counter);

}  // namespace meshloom
