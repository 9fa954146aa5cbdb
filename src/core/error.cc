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

}  // namespace meshloom
