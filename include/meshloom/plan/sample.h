#pragma once

#include <cstdint>

namespace meshloom::plan {

/// Metadata of one training document. No payload.
struct SampleInfo {
  std::int64_t id = 0;           ///< unique within a step
  std::int64_t tokens = 0;       ///< >= 1
  std::int64_t loss_tokens = 0;  ///< 0 .. tokens
  friend bool operator==(const SampleInfo&, const SampleInfo&) = default;
};

}  // namespace meshloom::plan
