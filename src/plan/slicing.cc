#include "meshloom/plan/slicing.h"

#include <fmt/format.h>

#include "meshloom/core/check.h"
#include "meshloom/mesh/layout.h"

namespace meshloom::plan {
namespace {

void check_sizes(std::int64_t tokens, int degree, const char* where) {
  MESHLOOM_CHECK(tokens >= 0, where, fmt::format("tokens is {}, expected >= 0", tokens));
  MESHLOOM_CHECK(degree >= 1 && degree <= Layout::kMaxWorldSize, where,
                 fmt::format("degree is {}, expected 1 .. {}", degree, Layout::kMaxWorldSize));
}

/// floor(k * s / n) for 0 <= k <= n without overflow: s % n < n, and n <= 2^25.
std::int64_t cut(std::int64_t s, std::int64_t n, std::int64_t k) {
  return s / n * k + s % n * k / n;
}

}  // namespace

TokenRange chunk_range(std::int64_t tokens, int degree, int chunk) {
  check_sizes(tokens, degree, "plan.chunk_range");
  const std::int64_t chunks = 2 * static_cast<std::int64_t>(degree);
  MESHLOOM_CHECK(chunk >= 0 && chunk < chunks, "plan.chunk_range",
                 fmt::format("chunk is {}, expected 0 .. {}", chunk, chunks - 1));
  return {cut(tokens, chunks, chunk), cut(tokens, chunks, std::int64_t{chunk} + 1)};
}

std::array<TokenRange, 2> member_ranges(std::int64_t tokens, int degree, int index) {
  check_sizes(tokens, degree, "plan.member_ranges");
  MESHLOOM_CHECK(index >= 0 && index < degree, "plan.member_ranges",
                 fmt::format("index is {}, expected 0 .. {}", index, degree - 1));
  if (degree == 1) return {TokenRange{0, tokens}, TokenRange{tokens, tokens}};
  const auto last = static_cast<int>(2 * static_cast<std::int64_t>(degree) - 1 - index);
  return {chunk_range(tokens, degree, index), chunk_range(tokens, degree, last)};
}

}  // namespace meshloom::plan
