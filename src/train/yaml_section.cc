#include "train/internal/yaml_section.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "meshloom/core/error.h"

namespace meshloom::train::detail {

namespace {

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

bool quoted(const YAML::Node& node) { return node.Tag() == "!"; }

const char* kind_of(const YAML::Node& node) {
  if (node.IsMap()) return "a mapping";
  if (node.IsSequence()) return "a list";
  if (node.IsNull()) return "nothing";
  return "a scalar";
}

/// YAML as JSON; unquoted scalars become null, booleans and numbers where they read as such.
nlohmann::ordered_json to_json_value(const YAML::Node& node) {
  if (node.IsMap()) {
    auto result = nlohmann::ordered_json::object();
    for (const auto& entry : node) result[entry.first.Scalar()] = to_json_value(entry.second);
    return result;
  }
  if (node.IsSequence()) {
    auto result = nlohmann::ordered_json::array();
    for (const auto& entry : node) result.push_back(to_json_value(entry));
    return result;
  }
  if (!node.IsScalar()) return nullptr;
  if (!quoted(node)) {
    std::int64_t integer = 0;
    double real = 0;
    std::string text = node.Scalar();
    if (text == "true" || text == "True") return true;
    if (text == "false" || text == "False") return false;
    if (text.find_first_not_of("0123456789_") == std::string::npos) std::erase(text, '_');
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), integer);
    if (error == std::errc() && end == text.data() + text.size()) return integer;
    if (YAML::convert<double>::decode(node, real)) return real;
  }
  return node.Scalar();
}

bool part_of_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

/// Where `text` has `name` as a word of its own.
std::size_t find_word(std::string_view text, std::string_view name) {
  std::size_t at = text.find(name);
  while (at != std::string_view::npos) {
    const std::size_t end = at + name.size();
    const bool begins = at == 0 || !part_of_name(text[at - 1]);
    if (begins && (end == text.size() || !part_of_name(text[end]))) break;
    at = text.find(name, at + 1);
  }
  return at;
}

}  // namespace

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(2, name.size() / 2) + 1;
  for (const std::string& candidate : candidates) {
    // A name that goes on where the other ends is near, whatever its length.
    const bool prefix = name.starts_with(candidate) || candidate.starts_with(name);
    const std::size_t distance = prefix ? 1 : edit_distance(name, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

YamlSection::YamlSection(const YAML::Node& node, std::string prefix, std::string file,
                         std::map<std::string, int>& lines)
    : node_(node), prefix_(std::move(prefix)), file_(std::move(file)), lines_(&lines) {
  if (!node_.IsMap()) {
    throw DataError(
        "train.config",
        fmt::format("{}:{}: {}: expected a mapping of keys, got {}", file_, node_.Mark().line + 1,
                    prefix_.empty() ? std::string("the file") : prefix_, kind_of(node_)));
  }
  std::vector<std::string> seen;
  for (const auto& entry : node_) {
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : std::string("?");
    if (std::find(seen.begin(), seen.end(), key) != seen.end()) {
      fail(entry.first, key, "the key is given twice");
    }
    seen.push_back(key);
    (*lines_)[dotted(key)] = entry.first.Mark().line + 1;
  }
}

std::string YamlSection::dotted(std::string_view key) const {
  return prefix_.empty() ? std::string(key) : fmt::format("{}.{}", prefix_, key);
}

void YamlSection::fail(const YAML::Node& at, const std::string& key,
                       const std::string& message) const {
  throw DataError("train.config",
                  fmt::format("{}:{}: {}: {}", file_, at.Mark().line + 1, dotted(key), message));
}

std::optional<YAML::Node> YamlSection::find(const char* key) {
  known_.emplace_back(key);
  for (const auto& entry : node_) {
    if (entry.first.IsScalar() && entry.first.Scalar() == key) {
      if (entry.second.IsNull()) {
        fail(entry.first, key, "has no value; leave the key out to get the default");
      }
      return entry.second;
    }
  }
  return std::nullopt;
}

std::string YamlSection::text(const YAML::Node& node, const char* key, const char* expected) const {
  if (!node.IsScalar()) {
    fail(node, key, fmt::format("expected {}, got {}", expected, kind_of(node)));
  }
  return node.Scalar();
}

void YamlSection::read(const char* key, std::string& field) {
  if (const auto node = find(key)) field = text(*node, key, "a string");
}

void YamlSection::read(const char* key, bool& field) {
  if (const auto node = find(key)) {
    const std::string given = text(*node, key, "true or false");
    if (quoted(*node) || !YAML::convert<bool>::decode(*node, field)) {
      fail(*node, key, fmt::format("expected true or false, got \"{}\"", given));
    }
  }
}

template <class T>
void YamlSection::integer(const char* key, T& field) {
  const auto node = find(key);
  if (!node) return;
  const std::string given = text(*node, key, "an integer");
  std::string digits = given;
  std::erase(digits, '_');
  T value{};
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (quoted(*node) || digits.empty() || error != std::errc() ||
      end != digits.data() + digits.size()) {
    fail(*node, key, fmt::format("expected an integer, got \"{}\"", given));
  }
  field = value;
}

void YamlSection::read(const char* key, int& field) { integer(key, field); }
void YamlSection::read(const char* key, std::int64_t& field) { integer(key, field); }
void YamlSection::read(const char* key, std::uint64_t& field) { integer(key, field); }

double YamlSection::real(const YAML::Node& node, const char* key) const {
  const std::string given = text(node, key, "a number");
  double value = 0.0;
  if (quoted(node) || !YAML::convert<double>::decode(node, value) || !std::isfinite(value)) {
    fail(node, key, fmt::format("expected a number, got \"{}\"", given));
  }
  return value;
}

void YamlSection::read(const char* key, double& field) {
  if (const auto node = find(key)) field = real(*node, key);
}

void YamlSection::read(const char* key, std::optional<double>& field) {
  if (const auto node = find(key)) field = real(*node, key);
}

void YamlSection::read(const char* key, std::vector<double>& field) {
  const auto node = find(key);
  if (!node) return;
  if (!node->IsSequence()) {
    fail(*node, key, fmt::format("expected a list of numbers, got {}", kind_of(*node)));
  }
  field.clear();
  for (const auto& entry : *node) field.push_back(real(entry, key));
}

void YamlSection::read(const char* key, std::vector<int>& field) {
  const auto node = find(key);
  if (!node) return;
  if (!node->IsSequence()) {
    fail(*node, key, fmt::format("expected a list of integers, got {}", kind_of(*node)));
  }
  field.clear();
  for (const auto& entry : *node) {
    int value = 0;
    if (!entry.IsScalar() || !YAML::convert<int>::decode(entry, value)) {
      fail(entry, key, "expected a list of integers");
    }
    field.push_back(value);
  }
}

void YamlSection::read(const char* key, std::vector<std::string>& field) {
  const auto node = find(key);
  if (!node) return;
  field.clear();
  if (node->IsScalar()) {
    field.push_back(node->Scalar());
    return;
  }
  if (!node->IsSequence()) {
    fail(*node, key, fmt::format("expected a list of strings, got {}", kind_of(*node)));
  }
  for (const auto& entry : *node) field.push_back(text(entry, key, "a list of strings"));
}

std::optional<YamlSection> YamlSection::section(const char* key) {
  const auto node = find(key);
  if (!node) return std::nullopt;
  return YamlSection(*node, dotted(key), file_, *lines_);
}

std::vector<YamlSection> YamlSection::list(const char* key) {
  std::vector<YamlSection> result;
  const auto node = find(key);
  if (!node) return result;
  if (!node->IsSequence()) {
    fail(*node, key, fmt::format("expected a list, got {}", kind_of(*node)));
  }
  for (std::size_t i = 0; i < node->size(); ++i) {
    result.emplace_back((*node)[i], fmt::format("{}[{}]", dotted(key), i), file_, *lines_);
  }
  return result;
}

void YamlSection::hand_over(const YAML::Node& mapping, const std::string& key,
                            const std::function<void(const std::string& json)>& read) const {
  std::map<std::string, YAML::Node> keys;  // dotted, inside the mapping
  const std::function<void(const YAML::Node&, const std::string&)> note =
      [&](const YAML::Node& node, const std::string& prefix) {
        for (const auto& entry : node) {
          const std::string name = prefix + entry.first.Scalar();
          if (!keys.emplace(name, entry.first).second) {
            fail(entry.first, key + "." + name, "the key is given twice");
          }
          if (entry.second.IsMap()) note(entry.second, name + ".");
        }
      };
  note(mapping, "");
  try {
    read(to_json_value(mapping).dump());
  } catch (const Error& error) {
    const std::string message = std::string(error.what()).substr(error.where().size() + 3);
    std::size_t first = std::string::npos;
    std::string named;
    for (const auto& [name, node] : keys) {
      const std::size_t at = find_word(message, name);
      if (at < first || (at == first && at != std::string::npos && name.size() > named.size())) {
        first = at;
        named = name;
      }
    }
    const YAML::Node& place = named.empty() ? mapping : keys.at(named);
    throw_error(error.code(), "train.config",
                fmt::format("{}:{}: {}{}: {}", file_, place.Mark().line + 1, dotted(key),
                            named.empty() ? "" : "." + named, message));
  }
}

void YamlSection::finish() const {
  for (const auto& entry : node_) {
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : std::string("?");
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    const std::string near = nearest_name(key, known_);
    fail(entry.first, key,
         near.empty() ? fmt::format("unknown key; known: {}", fmt::join(known_, ", "))
                      : fmt::format("unknown key; did you mean \"{}\"?", near));
  }
}

}  // namespace meshloom::train::detail
