#include "meshloom/plan/exchange_route.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "meshloom/core/check.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::plan {
namespace {

int mirrored(int degree, int chunk) { return 2 * degree - 1 - chunk; }

/// Adds rows at the end, joining what is adjacent.
void append(std::vector<RowSpan>& spans, std::int64_t begin, std::int64_t count) {
  if (count <= 0) return;
  if (!spans.empty() && spans.back().begin + spans.back().count == begin) {
    spans.back().count += count;
  } else {
    spans.push_back({begin, count});
  }
}

/// The steps of a unit's members, each on its own.
class Router {
 public:
  Router(std::span<const std::int64_t> lengths, int degree, std::int64_t window, bool relay)
      : lengths_(lengths), degree_(degree), window_(window), relay_(relay) {}

  /// Needed of one chunk of one document by a member and both its neighbours in the ring.
  struct Need {
    TokenRange chunk;
    std::int64_t relayed = 0;  ///< rows that the member before has and passes on
    std::int64_t own = 0;      ///< rows that the member needs
    std::int64_t passed = 0;   ///< rows that the next member gets from here
  };

  [[nodiscard]] RouteStep step(int member, int number) const {
    RouteStep result;
    result.owner = (member + degree_ - number) % degree_;
    std::vector<Need> needs;
    needs.reserve(2 * lengths_.size());
    for (const int chunk : {result.owner, mirrored(degree_, result.owner)}) {
      for (const std::int64_t tokens : lengths_) {
        needs.push_back(need(tokens, chunk, member, result.owner));
      }
    }
    std::vector<std::int64_t> relayed_at(needs.size());
    std::vector<std::int64_t> direct_at(needs.size());
    const auto hold = [&](std::size_t i, std::int64_t skip, std::int64_t rows) {
      if (rows == 0) return;
      result.held.push_back(
          {static_cast<int>(i % lengths_.size()), needs[i].chunk.end - skip - rows, rows});
      result.rows += rows;
    };
    for (std::size_t i = 0; i < needs.size(); ++i) {
      relayed_at[i] = result.rows;
      hold(i, 0, needs[i].relayed);
    }
    result.from_previous = result.rows;
    for (std::size_t i = 0; i < needs.size(); ++i) {
      direct_at[i] = result.rows;
      hold(i, needs[i].relayed, needs[i].own - needs[i].relayed);
    }
    // The end of the direct rows, which come before the relayed ones in the document.
    for (std::size_t i = 0; i < needs.size(); ++i) {
      const Need& n = needs[i];
      const std::int64_t of_direct = std::max<std::int64_t>(0, n.passed - n.relayed);
      const std::int64_t of_relayed = n.passed - of_direct;
      append(result.forward, direct_at[i] + n.own - n.relayed - of_direct, of_direct);
      append(result.forward, relayed_at[i] + n.relayed - of_relayed, of_relayed);
    }
    std::vector<RowSpan> sorted = result.forward;
    std::sort(sorted.begin(), sorted.end(),
              [](const RowSpan& a, const RowSpan& b) { return a.begin < b.begin; });
    std::int64_t row = 0;
    for (const RowSpan& span : sorted) {
      append(result.home, row, span.begin - row);
      row = span.begin + span.count;
    }
    append(result.home, row, result.rows - row);
    return result;
  }

 private:
  [[nodiscard]] Need need(std::int64_t tokens, int chunk, int member, int owner) const {
    Need result;
    result.chunk = chunk_range(tokens, degree_, chunk);
    result.own = needed_rows(tokens, degree_, chunk, member, window_);
    if (!relay_ || result.own == 0) return result;
    const int before = (member + degree_ - 1) % degree_;
    const int next = (member + 1) % degree_;
    if (before != owner) {
      result.relayed = std::min(result.own, needed_rows(tokens, degree_, chunk, before, window_));
    }
    if (next != owner) {
      result.passed = std::min(result.own, needed_rows(tokens, degree_, chunk, next, window_));
    }
    return result;
  }

  std::span<const std::int64_t> lengths_;
  int degree_;
  std::int64_t window_;
  bool relay_;
};

/// Where a member's batch has the tokens of its two chunks of every document.
class BatchRows {
 public:
  BatchRows(std::span<const std::int64_t> lengths, int degree, int member) {
    std::int64_t row = 0;
    for (const std::int64_t tokens : lengths) {
      const auto ranges = member_ranges(tokens, degree, member);
      places_.push_back({ranges, row});
      row += ranges[0].size() + ranges[1].size();
    }
  }
  [[nodiscard]] std::int64_t of(const TokenRun& run) const {
    const Place& place = places_[static_cast<std::size_t>(run.document)];
    const auto& [first, second] = place.ranges;
    if (run.position >= first.begin && run.position < first.end) {
      return place.row + run.position - first.begin;
    }
    return place.row + first.size() + run.position - second.begin;
  }

 private:
  struct Place {
    std::array<TokenRange, 2> ranges;
    std::int64_t row;
  };
  std::vector<Place> places_;
};

/// Calls `visit` with the parts of `runs`, laid one after another, that lie in [begin, end).
template <class Visit>
void for_rows(const std::vector<TokenRun>& runs, std::int64_t begin, std::int64_t end,
              const Visit& visit) {
  std::int64_t row = 0;
  for (const TokenRun& run : runs) {
    const std::int64_t first = std::max(begin, row);
    const std::int64_t last = std::min(end, row + run.rows);
    if (first < last) visit(TokenRun{run.document, run.position + first - row, last - first});
    row += run.rows;
    if (row >= end) break;
  }
}

}  // namespace

std::int64_t needed_rows(std::int64_t tokens, int degree, int chunk, int reader,
                         std::int64_t window) {
  const TokenRange keys = chunk_range(tokens, degree, chunk);
  if (keys.size() == 0 || reader == chunk || reader == mirrored(degree, chunk)) return 0;
  std::int64_t most = 0;
  for (const TokenRange& queries : member_ranges(tokens, degree, reader)) {
    if (queries.size() == 0 || queries.begin < keys.end) continue;
    if (window == 0) return keys.size();
    most = std::max(most, keys.end - (queries.begin - window + 1));
  }
  return std::min(most, keys.size());
}

std::int64_t needed_rows_in_all(std::int64_t tokens, int degree, std::int64_t window) {
  const std::int64_t chunks = 2 * static_cast<std::int64_t>(degree);
  if (degree == 1) return 0;
  std::int64_t rows = 0;
  if (window == 0 && tokens >= chunks) {
    // No chunk is empty: all others read a member's first chunk, and those before it its second.
    const std::int64_t half = chunk_range(tokens, degree, degree).begin;
    rows = half * (degree - 1);
    for (int member = 1; member < degree; ++member) {
      rows += chunk_range(tokens, degree, mirrored(degree, member)).end - half;
    }
    return rows;
  }
  for (int chunk = 0; chunk < static_cast<int>(chunks); ++chunk) {
    if (chunk_range(tokens, degree, chunk).size() == 0) continue;
    for (int reader = 0; reader < degree; ++reader) {
      rows += needed_rows(tokens, degree, chunk, reader, window);
    }
  }
  return rows;
}

ExchangeRoute make_route(std::span<const std::int64_t> lengths, int degree, int index,
                         std::int64_t window, bool relay) {
  MESHLOOM_CHECK(degree >= 1 && index >= 0 && index < degree, "plan.make_route",
                 fmt::format("member {} of {}, expected 0 .. {}", index, degree, degree - 1));
  const Router router(lengths, degree, window, relay);
  const BatchRows batch(lengths, degree, index);
  const auto size = static_cast<std::size_t>(degree);
  ExchangeRoute route;
  route.degree = degree;
  route.index = index;
  route.steps.resize(size);
  route.direct.resize(size);
  route.returned.resize(size);
  route.steps[0].owner = index;
  for (int s = 1; s < degree; ++s) {
    const auto at = static_cast<std::size_t>(s);
    route.steps[at] = router.step(index, s);
    const RouteStep there = router.step((index + s) % degree, s);
    for_rows(there.held, there.from_previous, there.rows,
             [&](const TokenRun& run) { append(route.direct[at], batch.of(run), run.rows); });
    for (const RowSpan& span : there.home) {
      for_rows(there.held, span.begin, span.begin + span.count,
               [&](const TokenRun& run) { append(route.returned[at], batch.of(run), run.rows); });
    }
  }
  return route;
}

std::int64_t rows_of(std::span<const RowSpan> spans) {
  std::int64_t rows = 0;
  for (const RowSpan& span : spans) rows += span.count;
  return rows;
}

}  // namespace meshloom::plan
