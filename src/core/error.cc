#include "meshloom/core/error.h"

#include <utility>

namespace meshloom {

Error::Error(ErrorCode code, std::string where, const std::string& message,
             std::source_location location)
    : std::runtime_error("[" + where + "] " + message),
      code_(code),
      where_(std::move(where)),
      location_(location) {}

Error::~Error() = default;

void throw_error(ErrorCode code, std::string where, const std::string& message,
                 std::source_location location) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      throw InvalidArgument(std::move(where), message, location);
    case ErrorCode::kNotSupported:
      throw NotSupported(std::move(where), message, location);
    case ErrorCode::kPlan:
      throw PlanError(std::move(where), message, location);
    case ErrorCode::kComm:
      throw CommError(std::move(where), message, location);
    case ErrorCode::kTimeout:
      throw Timeout(std::move(where), message, location);
    case ErrorCode::kData:
      throw DataError(std::move(where), message, location);
    case ErrorCode::kIo:
      throw IoError(std::move(where), message, location);
  }
  throw InvalidArgument("core.throw_error", "unknown error code", location);
}

}  // namespace meshloom
