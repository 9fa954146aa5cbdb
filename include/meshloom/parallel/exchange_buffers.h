#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <optional>

#include "meshloom/core/export.h"

namespace meshloom::parallel {

/// Transfer buffers that exchanges of one rank take turns with, so that a steady state allocates
/// nothing: each grows to the largest use and stays. Not thread safe.
class MESHLOOM_API ExchangeBuffers {
 public:
  static constexpr std::size_t kCount = 32;

  /// Uninitialised; valid until the next call with this index. @param index  below kCount
  at::Tensor take(std::size_t index, at::IntArrayRef sizes, const at::TensorOptions& options);

 private:
  std::array<at::Tensor, kCount> buffers_;
};

/// What an exchange may do otherwise than the plan says nothing about. The same on all ranks.
struct ExchangeOptions {
  /// Of keys and values on their way between ranks; none: as they are computed. A narrower type
  /// rounds what other ranks hold, once, and leaves a rank's own keys, queries and all gradients
  /// as they are.
  std::optional<at::ScalarType> wire_type;
};

}  // namespace meshloom::parallel
