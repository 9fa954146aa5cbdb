#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::plan {

/// Rows [begin, begin + count) of some buffer or batch.
struct RowSpan {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  friend bool operator==(const RowSpan&, const RowSpan&) = default;
};

/// Tokens position, position + 1, ... of the unit's document number `document`.
struct TokenRun {
  int document = 0;
  std::int64_t position = 0;
  std::int64_t rows = 0;
  friend bool operator==(const TokenRun&, const TokenRun&) = default;
};

/// How many rows at the end of `chunk` (of 2D) some query of member `reader` attends to. What a
/// member reads of a chunk that it does not hold is always its end: queries lie behind it, and a
/// window cuts off the far side. 0 where the reader holds the chunk itself.
/// @param tokens  of the whole document @param window  tokens a query sees; 0: all before it
/// @throws InvalidArgument  as `chunk_range`.
[[nodiscard]] MESHLOOM_API std::int64_t needed_rows(std::int64_t tokens, int degree, int chunk,
                                                    int reader, std::int64_t window);

/// Rows of keys and values that the members of a unit need of each other, for one document: every
/// pair of row and reader counts once. Every way of moving whole keys and values sends exactly
/// these.
[[nodiscard]] MESHLOOM_API std::int64_t needed_rows_in_all(std::int64_t tokens, int degree,
                                                           std::int64_t window);

/// What one member attends to in one step of an exchange, and where it comes from and goes.
struct RouteStep {
  int owner = 0;  ///< the member whose rows these are
  /// Rows at hand, in buffer order: all chunks `owner` of the documents, then all 2D-1-`owner`.
  /// First come those that the member before had, too.
  std::vector<TokenRun> held;
  std::int64_t rows = 0;           ///< of all of `held`
  std::int64_t from_previous = 0;  ///< rows that the member before passes on; the owner sends the
                                   ///< rest
  std::vector<RowSpan> forward;    ///< rows of the buffer that the next member gets from here
  std::vector<RowSpan> home;       ///< the others: their gradients are complete here
};

/// The traffic of one member of a unit: a pure function of lengths, degree and window, so that
/// sender and receiver know every message without asking. Step s (1 .. D-1) is attention to what is
/// needed of the member s places before; `steps[0]` is empty.
///
/// With `relay` a row travels from neighbour to neighbour as long as each needs it, and straight
/// from its owner to a member whose predecessor does not. Its gradient follows the same way, summed
/// up as it goes, and goes home from the last member of such a chain. Without, every row comes
/// straight from its owner and every gradient goes straight back. The bytes are the same.
struct ExchangeRoute {
  int degree = 1;
  int index = 0;
  std::vector<RouteStep> steps;
  /// Own rows sent to the member s places behind, for its step s; rows of this member's batch.
  std::vector<std::vector<RowSpan>> direct;
  /// Own rows whose gradients come home from the member s places behind after its step s.
  std::vector<std::vector<RowSpan>> returned;
};

/// @param lengths  tokens of each document of the unit, in local order
/// @throws InvalidArgument  degree < 1, or index outside 0 .. degree - 1.
[[nodiscard]] MESHLOOM_API ExchangeRoute make_route(std::span<const std::int64_t> lengths,
                                                    int degree, int index, std::int64_t window,
                                                    bool relay);

[[nodiscard]] MESHLOOM_API std::int64_t rows_of(std::span<const RowSpan> spans);

}  // namespace meshloom::plan
