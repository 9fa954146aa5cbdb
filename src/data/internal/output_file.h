#pragma once

#include <string>
#include <string_view>

namespace meshloom::data::detail {

/// Writes under a temporary name beside `path`, flushes to disk, renames. @throws IoError  names
/// the path and the reason; what was at `path` is untouched.
void write_file(const std::string& path, std::string_view bytes);

}  // namespace meshloom::data::detail
