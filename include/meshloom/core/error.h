#pragma once

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

#include "meshloom/core/export.h"

namespace meshloom {

enum class ErrorCode : std::uint8_t {
  kInvalidArgument,
  kNotSupported,
  kPlan,
  kComm,
  kTimeout,
  kData,
  kIo,
};

/// Root of every exception that Meshloom throws; each kind maps to one Python class of the same
/// name. `what()` reads `[where] message`: where it happened, who, what was given, what was
/// expected. File and line of the throw are kept beside the sentence, not in it.
class MESHLOOM_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, std::string where, const std::string& message,
        std::source_location location);
  ~Error() override;

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }
  [[nodiscard]] const std::string& where() const noexcept { return where_; }
  [[nodiscard]] const std::source_location& location() const noexcept { return location_; }

 private:
  ErrorCode code_;
  std::string where_;
  std::source_location location_;
};

/// One class a code, so that callers catch what they can handle.
template <ErrorCode Code>
class MESHLOOM_API CodedError final : public Error {
 public:
  CodedError(std::string where, const std::string& message,
             std::source_location location = std::source_location::current())
      : Error(Code, std::move(where), message, location) {}
};

using InvalidArgument = CodedError<ErrorCode::kInvalidArgument>;  ///< the caller's mistake
using NotSupported = CodedError<ErrorCode::kNotSupported>;        ///< valid, but not built
using PlanError = CodedError<ErrorCode::kPlan>;                   ///< a plan breaks a contract
using CommError = CodedError<ErrorCode::kComm>;                   ///< transport failed, group dead
using Timeout = CodedError<ErrorCode::kTimeout>;                  ///< a wait ran past its limit
using DataError = CodedError<ErrorCode::kData>;                   ///< unreadable or invalid data
using IoError = CodedError<ErrorCode::kIo>;                       ///< the file system said no

/// Throws the class that belongs to `code`; for code that adds context to an error in flight.
[[noreturn]] MESHLOOM_API void throw_error(
    ErrorCode code, std::string where, const std::string& message,
    std::source_location location = std::source_location::current());

}  // namespace meshloom
