#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "meshloom/plan/slicing.h"

namespace meshloom::model {

/// A label that is no target.
inline constexpr std::int64_t kIgnoreLabel = -100;

/// What this rank holds of one document: up to two contiguous ranges, adjacent in the batch.
struct DocumentSlice {
  std::int64_t sample = 0;  ///< sample id, for messages
  std::int64_t length = 0;  ///< tokens of the whole document
  std::array<plan::TokenRange, 2> ranges;
  [[nodiscard]] std::int64_t tokens() const { return ranges[0].size() + ranges[1].size(); }
};

/// One rank's share of one unit: T tokens, document by document, no padding. T may be 0.
struct SequenceBatch {
  at::Tensor tokens;     ///< int64 [T]; undefined in stages without embedding
  at::Tensor positions;  ///< int64 [T], within the document
  /// int64 [T], the next token of the document or kIgnoreLabel; undefined in stages without head.
  at::Tensor labels;
  std::vector<DocumentSlice> documents;
  [[nodiscard]] std::int64_t size() const { return positions.defined() ? positions.size(0) : 0; }
};

}  // namespace meshloom::model
