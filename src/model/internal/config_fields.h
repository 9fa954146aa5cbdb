#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "meshloom/core/error.h"
#include "meshloom/model/config.h"
#include "model/internal/families.h"

/// How config.json is read, and the parts of it that one family has alone.
namespace meshloom::model::detail {

[[noreturn]] inline void wrong_type(const std::string& key, std::string_view expected,
                                    const nlohmann::json& value) {
  throw DataError(kConfigWhere, fmt::format("{} is {}, expected {}", key, value.dump(), expected));
}

/// Reads one JSON object's fields by name; null counts as absent.
class Fields {
 public:
  static constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();
  static constexpr std::int64_t kMostEntries = 65'536;

  Fields(const nlohmann::json& object, std::string prefix)
      : object_(object), prefix_(std::move(prefix)) {}

  [[nodiscard]] const nlohmann::json* get(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  [[nodiscard]] bool present(const char* key) const { return object_.contains(key); }

  [[nodiscard]] std::int64_t size(const char* key) const {
    if (get(key) == nullptr) missing(key);
    return size(key, 0);
  }
  /// A positive size, by default one that fits a tensor dimension.
  [[nodiscard]] std::int64_t size(const char* key, std::int64_t fallback,
                                  std::int64_t most = kMostSize) const {
    const nlohmann::json* value = get(key);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer() || *value < 1 || *value > most) {
      wrong_type(prefix_ + key, fmt::format("a positive integer up to {}", most), *value);
    }
    return value->get<std::int64_t>();
  }
  /// A number of layers or experts, of which tables are made: a bound against hostile files.
  [[nodiscard]] std::int64_t count(const char* key) const {
    if (get(key) == nullptr) missing(key);
    return size(key, 0, kMostEntries);
  }
  [[nodiscard]] std::int64_t token(const char* key) const {
    const nlohmann::json* value = get(key);
    if (value == nullptr) return -1;
    if (!value->is_number_integer()) wrong_type(prefix_ + key, "an integer or null", *value);
    return value->get<std::int64_t>();
  }
  [[nodiscard]] double number(const char* key, double fallback) const {
    const nlohmann::json* value = get(key);
    if (value == nullptr) return fallback;
    if (!value->is_number()) wrong_type(prefix_ + key, "a number", *value);
    return value->get<double>();
  }
  [[nodiscard]] double number(const char* key) const {
    if (get(key) == nullptr) missing(key);
    return number(key, 0.0);
  }
  [[nodiscard]] bool boolean(const char* key, bool fallback) const {
    const nlohmann::json* value = get(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) wrong_type(prefix_ + key, "true or false", *value);
    return value->get<bool>();
  }
  [[nodiscard]] std::string text(const char* key, const char* fallback) const {
    const nlohmann::json* value = get(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) wrong_type(prefix_ + key, "a string", *value);
    return value->get<std::string>();
  }

 private:
  [[noreturn]] void missing(const char* key) const {
    throw DataError(kConfigWhere, fmt::format("{}{} is missing", prefix_, key));
  }
  const nlohmann::json& object_;
  std::string prefix_;
};

/// Whether a value of a key that we do not know may change nothing: null, false, 0, empty.
inline bool is_off(const nlohmann::json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
         (value.is_number() && value.get<double>() == 0.0) ||
         ((value.is_array() || value.is_object() || value.is_string()) && value.empty()) ||
         (value.is_string() && value.get<std::string>().empty());
}

/// Latent attention, and experts in groups with shared ones, as DeepSeek-V3 has them: read from and
/// written to config.json. @pre the sizes that all families have are read.
void read_latent_attention(ModelConfig& config, const Fields& fields);
void read_grouped_experts(ModelConfig& config, const Fields& fields);
void write_latent_attention(const ModelConfig& config, nlohmann::json& root);
void write_grouped_experts(const ModelConfig& config, nlohmann::json& root);

/// Checks what both add. @throws DataError  sizes that contradict each other.
void validate_latent_attention(const ModelConfig& config);
void validate_grouped_experts(const ModelConfig& config);

}  // namespace meshloom::model::detail
