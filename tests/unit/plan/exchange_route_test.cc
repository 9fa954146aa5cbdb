#include "meshloom/plan/exchange_route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::plan::exchange_route {
namespace {

using Token = std::pair<int, std::int64_t>;  // document, position

/// A unit and everything about it that counting token by token can tell.
struct Unit {
  std::vector<std::int64_t> lengths;
  int degree = 1;
  std::int64_t window = 0;

  [[nodiscard]] std::vector<Token> batch(int member) const {
    std::vector<Token> tokens;
    for (std::size_t d = 0; d < lengths.size(); ++d) {
      for (const auto& range : member_ranges(lengths[d], degree, member)) {
        for (auto t = range.begin; t < range.end; ++t) tokens.emplace_back(static_cast<int>(d), t);
      }
    }
    return tokens;
  }
  /// What queries of `reader` attend to among the tokens of `owner`.
  [[nodiscard]] std::set<Token> needed(int reader, int owner) const {
    std::set<Token> result;
    const auto keys = batch(owner);
    for (const Token& query : batch(reader)) {
      for (const Token& key : keys) {
        if (key.first != query.first || key.second > query.second) continue;
        if (window > 0 && query.second - key.second >= window) continue;
        result.insert(key);
      }
    }
    return result;
  }
  [[nodiscard]] std::string text() const {
    std::string result = "degree " + std::to_string(degree) + ", window " + std::to_string(window);
    for (const auto tokens : lengths) result += ", " + std::to_string(tokens);
    return result;
  }
};

std::vector<Token> tokens_of(const std::vector<TokenRun>& runs) {
  std::vector<Token> result;
  for (const TokenRun& run : runs) {
    for (std::int64_t t = 0; t < run.rows; ++t) result.emplace_back(run.document, run.position + t);
  }
  return result;
}

std::vector<Token> pick(const std::vector<Token>& from, const std::vector<RowSpan>& spans) {
  std::vector<Token> result;
  for (const RowSpan& span : spans) {
    for (std::int64_t i = 0; i < span.count; ++i) {
      result.push_back(from.at(static_cast<std::size_t>(span.begin + i)));
    }
  }
  return result;
}

/// Lengths that reach every corner: shorter than the chunks, prime, long.
Unit random_unit(std::uint64_t seed) {
  std::uint64_t draw = 0;
  const auto below = [&](std::uint64_t n) {
    return static_cast<std::int64_t>(random_uniform(seed, draw++) * static_cast<double>(n));
  };
  Unit unit;
  unit.degree = 1 + static_cast<int>(below(8));
  const auto documents = 1 + below(4);
  for (std::int64_t d = 0; d < documents; ++d) {
    unit.lengths.push_back(1 + (below(2) == 0 ? below(20) : below(90)));
  }
  if (below(2) == 0) unit.window = 1 + below(60);
  return unit;
}

class Routes : public ::testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Ways, Routes, ::testing::Bool(), [](const auto& entry) {
  return std::string(entry.param ? "Relayed" : "Direct");
});

TEST_P(Routes, CarryExactlyWhatReadersNeed) {
  const bool relay = GetParam();
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const Unit unit = random_unit(seed);
    SCOPED_TRACE(unit.text());
    const int size = unit.degree;
    std::vector<ExchangeRoute> routes;
    for (int i = 0; i < size; ++i) {
      routes.push_back(make_route(unit.lengths, size, i, unit.window, relay));
    }
    std::int64_t sent = 0;
    std::int64_t returned = 0;
    for (int i = 0; i < size; ++i) {
      const ExchangeRoute& route = routes[static_cast<std::size_t>(i)];
      for (int s = 1; s < size; ++s) {
        const RouteStep& step = route.steps[static_cast<std::size_t>(s)];
        ASSERT_EQ(step.owner, (i + size - s) % size);
        const auto held = tokens_of(step.held);
        ASSERT_EQ(static_cast<std::int64_t>(held.size()), step.rows);
        ASSERT_EQ(std::set<Token>(held.begin(), held.end()), unit.needed(i, step.owner));
        ASSERT_EQ(std::set<Token>(held.begin(), held.end()).size(), held.size());

        // What the member before forwards, and the owner sends, is what arrives.
        const auto middle = held.begin() + step.from_previous;
        const auto before = static_cast<std::size_t>((i + size - 1) % size);
        const RouteStep& earlier = routes[before].steps[static_cast<std::size_t>(s - 1)];
        ASSERT_EQ(pick(tokens_of(earlier.held), earlier.forward),
                  std::vector<Token>(held.begin(), middle));
        const auto& owner = routes[static_cast<std::size_t>(step.owner)];
        ASSERT_EQ(pick(unit.batch(step.owner), owner.direct[static_cast<std::size_t>(s)]),
                  std::vector<Token>(middle, held.end()));
        ASSERT_EQ(pick(unit.batch(step.owner), owner.returned[static_cast<std::size_t>(s)]),
                  pick(held, step.home));

        // Every gradient goes on or home, none does both.
        auto leaving = pick(held, step.forward);
        const auto home = pick(held, step.home);
        leaving.insert(leaving.end(), home.begin(), home.end());
        std::sort(leaving.begin(), leaving.end());
        auto all = held;
        std::sort(all.begin(), all.end());
        ASSERT_EQ(leaving, all);
        sent += step.rows;
        returned += rows_of(step.forward) + rows_of(step.home);
        if (!relay) {
          ASSERT_TRUE(step.forward.empty());
        }
      }
    }
    std::int64_t closed = 0;
    for (const auto tokens : unit.lengths) {
      closed += needed_rows_in_all(tokens, size, unit.window);
    }
    ASSERT_EQ(sent, closed);
    ASSERT_EQ(returned, closed);
  }
}

TEST(Routes, RelayCausalChunksFromNeighbourToNeighbour) {
  // Of 8 chunks of 10 tokens on 4 members: member 1 has chunks 1 and 6.
  const std::vector<std::int64_t> lengths{80};
  const auto first = make_route(lengths, 4, 0, 0, true);
  // Member 0 has the last queries, so it needs everything; later chunks come from their owners.
  for (int s = 1; s < 4; ++s) {
    const RouteStep& step = first.steps[static_cast<std::size_t>(s)];
    EXPECT_EQ(step.rows, 20);
    EXPECT_EQ(step.from_previous, s == 1 ? 0 : 10);
  }
  // Member 3 has the earliest of the late chunks: it needs early chunks alone.
  const auto last = make_route(lengths, 4, 3, 0, true);
  for (int s = 1; s < 4; ++s) {
    const RouteStep& step = last.steps[static_cast<std::size_t>(s)];
    EXPECT_EQ(step.rows, 10);
    EXPECT_EQ(step.from_previous, s == 1 ? 0 : 10);
  }
}

TEST(Routes, LeaveOutWhatOneMemberHoldsAlone) {
  EXPECT_EQ(needed_rows_in_all(1, 8, 0), 0);
  EXPECT_EQ(needed_rows_in_all(1000, 1, 0), 0);
  EXPECT_EQ(needed_rows_in_all(1000, 8, 1), 0);
}

TEST(Routes, ClosedFormHoldsForLongDocuments) {
  // Without windows: all but the owner read each of the first D chunks, and m members chunk 2D-1-m.
  const std::int64_t chunk = 1 << 20;
  for (const int degree : {2, 3, 16, 1000}) {
    const std::int64_t d = degree;
    EXPECT_EQ(needed_rows_in_all(2 * d * chunk, degree, 0),
              d * (d - 1) * chunk + d * (d - 1) / 2 * chunk);
  }
}

TEST(Routes, RefuseMembersOutsideTheUnit) {
  const std::vector<std::int64_t> lengths{4};
  EXPECT_THROW((void)make_route(lengths, 2, 2, 0, true), InvalidArgument);
  EXPECT_THROW((void)make_route(lengths, 0, 0, 0, true), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::plan::exchange_route
