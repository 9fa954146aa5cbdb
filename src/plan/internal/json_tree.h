#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace meshloom::plan::detail {

/// A parsed JSON value that tells integers from floats and keeps members in file order.
struct JsonNode {
  using Array = std::vector<JsonNode>;
  using Object = std::vector<std::pair<std::string, JsonNode>>;
  /// Null, boolean, integer, integer beyond int64, float, string, array, object.
  std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string, Array,
               Object>
      value;
};

/// Strict JSON: UTF-8, no duplicate keys, at most 32 levels deep.
/// @throws PlanError  names line and column, or the path of the offending value.
[[nodiscard]] JsonNode parse_json(std::string_view text, const char* where);

/// What a node is, for messages: `"abc"`, `-3`, `an array`.
[[nodiscard]] std::string describe(const JsonNode& node);

}  // namespace meshloom::plan::detail
