#pragma once

#include <string>

#include "meshloom/core/export.h"

namespace meshloom {

/// Where a world rank sits: the static part of the mesh.
struct Coordinates {
  int tp = 0;
  int hdp = 0;
  int pp = 0;
  friend bool operator==(const Coordinates&, const Coordinates&) = default;
};

/// Sizes of the static mesh. World = pp x hdp x tp, tp fastest. Expert-parallel groups are `ep`
/// neighbouring HDP ranks of one stage; `chunks` are model chunks a rank holds with interleaving.
struct MESHLOOM_API Layout {
  int tp = 1;
  int hdp = 1;
  int pp = 1;
  int ep = 1;
  int chunks = 1;

  /// Most ranks a layout may have; keeps hostile input from asking for absurd memory.
  static constexpr int kMaxWorldSize = 1 << 24;

  [[nodiscard]] int world_size() const { return tp * hdp * pp; }
  [[nodiscard]] Coordinates coordinates(int rank) const;
  [[nodiscard]] int rank(const Coordinates& at) const;

  /// @throws InvalidArgument  a size is below 1, ep does not divide hdp (the message lists the
  ///   nearest that do), or the world is too large; names the field.
  void validate() const;

  /// Reads "hdp=4,tp=2". Unnamed sizes are 1.
  /// @throws InvalidArgument  unknown key, not a number, or invalid sizes.
  [[nodiscard]] static Layout parse(const std::string& text);
  [[nodiscard]] std::string to_string() const;

  friend bool operator==(const Layout&, const Layout&) = default;
};

}  // namespace meshloom
