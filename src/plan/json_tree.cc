#include "plan/internal/json_tree.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>

#include "meshloom/core/error.h"

namespace meshloom::plan::detail {
namespace {

constexpr std::size_t kMostLevels = 32;
constexpr std::size_t kShownCharacters = 40;

/// Receives nlohmann's SAX events and builds the tree; its parser does not recurse.
class TreeBuilder {
 public:
  TreeBuilder(JsonNode& root, const char* where) : root_(root), where_(where) {}

  bool null() { return put(JsonNode{}); }
  bool boolean(bool value) { return put({value}); }
  bool number_integer(std::int64_t value) { return put({value}); }
  bool number_unsigned(std::uint64_t value) {
    if (value > static_cast<std::uint64_t>(INT64_MAX)) return put({value});
    return put({static_cast<std::int64_t>(value)});
  }
  bool number_float(double value, const std::string&) { return put({value}); }
  bool string(std::string& value) { return put({std::move(value)}); }
  bool binary(std::vector<std::uint8_t>&) { return false; }
  bool start_object(std::size_t) { return open({JsonNode::Object{}}); }
  bool start_array(std::size_t) { return open({JsonNode::Array{}}); }
  bool key(std::string& name) {
    key_ = std::move(name);
    return true;
  }
  bool end_object() {
    check_keys(std::get<JsonNode::Object>(stack_.back()->value));
    stack_.pop_back();
    return true;
  }
  bool end_array() {
    stack_.pop_back();
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) {
    std::string message = error.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    if (const auto end = message.find("] "); end != std::string::npos) message.erase(0, end + 2);
    throw PlanError(where_, "not valid JSON: " + message);
  }

 private:
  bool put(JsonNode node) {
    place(std::move(node));
    return true;
  }

  bool open(JsonNode node) {
    if (stack_.size() >= kMostLevels) {
      throw PlanError(where_, fmt::format("nested deeper than {} levels", kMostLevels));
    }
    stack_.push_back(place(std::move(node)));
    return true;
  }

  /// Pointers on the stack stay valid: only the innermost container grows.
  JsonNode* place(JsonNode node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return &root_;
    }
    auto& parent = stack_.back()->value;
    if (auto* array = std::get_if<JsonNode::Array>(&parent)) {
      array->push_back(std::move(node));
      return &array->back();
    }
    auto& object = std::get<JsonNode::Object>(parent);
    object.emplace_back(std::move(key_), std::move(node));
    return &object.back().second;
  }

  void check_keys(const JsonNode::Object& object) const {
    std::vector<std::string_view> keys;
    keys.reserve(object.size());
    for (const auto& member : object) keys.push_back(member.first);
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) {
      throw PlanError(where_, fmt::format("the key \"{}\" occurs twice in one object",
                                          twice->substr(0, kShownCharacters)));
    }
  }

  JsonNode& root_;
  const char* where_;
  std::vector<JsonNode*> stack_;
  std::string key_;
};

}  // namespace

JsonNode parse_json(std::string_view text, const char* where) {
  JsonNode root;
  TreeBuilder builder(root, where);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return root;
}

std::string describe(const JsonNode& node) {
  struct Describer {
    std::string operator()(std::monostate) const { return "null"; }
    std::string operator()(bool value) const { return value ? "true" : "false"; }
    std::string operator()(std::int64_t value) const { return fmt::format("{}", value); }
    std::string operator()(std::uint64_t value) const { return fmt::format("{}", value); }
    std::string operator()(double value) const { return fmt::format("{} (not an integer)", value); }
    std::string operator()(const std::string& value) const {
      if (value.size() <= kShownCharacters) return "\"" + value + "\"";
      return "\"" + value.substr(0, kShownCharacters) + "...\"";
    }
    std::string operator()(const JsonNode::Array&) const { return "an array"; }
    std::string operator()(const JsonNode::Object&) const { return "an object"; }
  };
  return std::visit(Describer{}, node.value);
}

}  // namespace meshloom::plan::detail
