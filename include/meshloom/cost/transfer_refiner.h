#pragma once

#include <string>
#include <string_view>

#include "meshloom/core/export.h"

namespace meshloom {

/// Copies of activations in one step, summed over ranks.
struct TransferTiming {
  double out_bytes = 0.0;  ///< to host memory
  double out_seconds = 0.0;
  double back_bytes = 0.0;
  double back_seconds = 0.0;
  double saved_bytes = 0.0;  ///< left for backward by all layers, moved or not
  double tokens = 0.0;       ///< of the step

  friend bool operator==(const TransferTiming&, const TransferTiming&) = default;
};

/// Follows measured copies while training and gives `MemoryModel::transfer`: recent steps count
/// most. Plain data; the same steps in the same order give the same figure. Not thread safe.
class MESHLOOM_API TransferRefiner {
 public:
  /// @throws InvalidArgument  a figure is negative or not finite; nothing was changed.
  void add(const TransferTiming& timing);

  /// Seconds to move one token's activations of all layers, spread over `ranks` (a stage's and a
  /// tensor-parallel group's), by the slower of the two directions; 0 where nothing has moved.
  [[nodiscard]] double seconds_per_token(int ranks) const;

  /// For checkpoints. @throws InvalidArgument  not a state that `to_json` wrote.
  [[nodiscard]] std::string to_json() const;
  [[nodiscard]] static TransferRefiner from_json(std::string_view text);

  friend bool operator==(const TransferRefiner&, const TransferRefiner&) = default;

 private:
  TransferTiming sums_;  ///< recent steps count most
};

}  // namespace meshloom
