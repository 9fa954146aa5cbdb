#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::data {

/// A tokenised document. Token t is a target (of the prediction made at t - 1) where
/// loss_mask[t] != 0; an empty mask means all. Token 0 is never a target.
struct MESHLOOM_API Document {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint8_t> loss_mask;  ///< empty, or tokens.size()
  [[nodiscard]] std::int64_t loss_tokens() const;
};

/// Documents by index, in a fixed order. Thread safe.
class MESHLOOM_API Source {
 public:
  virtual ~Source();
  [[nodiscard]] virtual const std::string& name() const = 0;
  [[nodiscard]] virtual std::int64_t size() const = 0;
  /// Reads and tokenises. @throws DataError  names the file and line.
  [[nodiscard]] virtual Document load(std::int64_t index) const = 0;
};

}  // namespace meshloom::data
