#pragma once

#include <array>
#include <cstdint>

#include "meshloom/core/export.h"

namespace meshloom::plan {

/// Half-open token range of one document.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t size() const { return end - begin; }
  friend bool operator==(const TokenRange&, const TokenRange&) = default;
};

/// Chunk k of 2D: [floor(k*s/2D), floor((k+1)*s/2D)) of a document of s tokens: cuts at
/// floor(k*s/2D), so chunks of one document differ by at most one token.
/// @throws InvalidArgument  tokens < 0, degree < 1, or chunk outside 0 .. 2D-1.
[[nodiscard]] MESHLOOM_API TokenRange chunk_range(std::int64_t tokens, int degree, int chunk);

/// What member `index` of a `degree`-rank unit holds of a document: chunk `index`, then chunk
/// `2D-1-index`. With degree 1 the first range is the whole document and the second is empty.
[[nodiscard]] MESHLOOM_API std::array<TokenRange, 2> member_ranges(std::int64_t tokens, int degree,
                                                                   int index);

}  // namespace meshloom::plan
