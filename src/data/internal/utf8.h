#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace meshloom::data::detail {

/// Index of the first byte that begins no valid UTF-8 character (RFC 3629: no overlong forms, no
/// surrogates, at most U+10FFFF); text.size() where all is valid.
[[nodiscard]] std::size_t first_invalid_utf8(std::string_view text);

/// @throws DataError  "`who`: invalid UTF-8 at byte N (0x..)".
void require_utf8(std::string_view text, const char* where, const std::string& who);

}  // namespace meshloom::data::detail
