#include "meshloom/parallel/span.h"

namespace meshloom::parallel {

const char* to_string(Span::Kind kind) {
  switch (kind) {
    case Span::Kind::kLoad:
      return "load";
    case Span::Kind::kForward:
      return "forward";
    case Span::Kind::kBackward:
      return "backward";
    case Span::Kind::kExchange:
      return "exchange";
    case Span::Kind::kWait:
      return "wait";
    case Span::Kind::kDispatch:
      return "dispatch";
    case Span::Kind::kTensor:
      return "tensor";
    case Span::Kind::kPipeline:
      return "pipeline";
    case Span::Kind::kOffload:
      return "offload";
    case Span::Kind::kReduce:
      return "reduce";
    case Span::Kind::kStep:
      return "step";
  }
  return "unknown";
}

}  // namespace meshloom::parallel
