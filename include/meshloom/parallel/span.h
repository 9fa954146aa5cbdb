#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

#include "meshloom/core/export.h"

namespace meshloom::parallel {

/// One span of a rank's time, for timelines and cost fitting.
struct Span {
  enum class Kind : std::uint8_t {
    kLoad,
    kForward,
    kBackward,
    kExchange,  ///< keys and values in flight, from posting to arrival; overlaps computation
    kWait,      ///< the part of an exchange that computation did not hide
    kDispatch,  ///< waiting for tokens on their way to experts or back
    kTensor,    ///< waiting for rows of the tensor-parallel group
    kPipeline,  ///< waiting for activations of another stage, or their gradients
    kOffload,   ///< waiting for activations on their way to host memory or back
    kReduce,
    kStep,
  };
  Kind kind = Kind::kForward;
  std::chrono::steady_clock::time_point begin;
  std::chrono::steady_clock::time_point end;
  int slot = -1;
  int unit = -1;
};

[[nodiscard]] MESHLOOM_API const char* to_string(Span::Kind kind);

using SpanSink = std::function<void(Span::Kind kind, std::chrono::steady_clock::time_point begin,
                                    std::chrono::steady_clock::time_point end)>;

}  // namespace meshloom::parallel
