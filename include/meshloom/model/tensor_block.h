#pragma once

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

/// A box of a row-major tensor.
struct MESHLOOM_API TensorBlock {
  std::vector<std::int64_t> offset;
  std::vector<std::int64_t> extent;
  [[nodiscard]] std::int64_t elements() const;
  friend bool operator==(const TensorBlock&, const TensorBlock&) = default;
};

/// Elements [begin, end) of a row-major tensor as boxes in memory order: at most 2 rank - 1.
[[nodiscard]] MESHLOOM_API std::vector<TensorBlock> blocks_of_range(
    const std::vector<std::int64_t>& shape, std::int64_t begin, std::int64_t end);

}  // namespace meshloom::model
