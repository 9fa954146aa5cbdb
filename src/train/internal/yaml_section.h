#pragma once

#include <yaml-cpp/yaml.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace meshloom::train::detail {

/// One mapping of a YAML file, read strictly: every key is asked for by name, `finish` refuses the
/// rest. Messages name file, line and the dotted key.
class YamlSection {
 public:
  /// @param prefix  dotted path of the mapping, empty at the top
  YamlSection(const YAML::Node& node, std::string prefix, std::string file,
              std::map<std::string, int>& lines);

  void read(const char* key, std::string& field);
  void read(const char* key, bool& field);
  void read(const char* key, int& field);
  void read(const char* key, std::int64_t& field);
  void read(const char* key, std::uint64_t& field);
  void read(const char* key, double& field);
  void read(const char* key, std::optional<double>& field);
  void read(const char* key, std::vector<double>& field);
  void read(const char* key, std::vector<int>& field);
  /// One scalar stands for a list of one.
  void read(const char* key, std::vector<std::string>& field);

  /// The node of a key, or nothing where it is absent.
  [[nodiscard]] std::optional<YAML::Node> find(const char* key);
  [[nodiscard]] std::optional<YamlSection> section(const char* key);
  [[nodiscard]] std::vector<YamlSection> list(const char* key);

  /// Hands the mapping at `key` as JSON text to a reader of its own. An Error of that reader gets
  /// the file, and the line and dotted key of the first of the mapping's keys that it names.
  void hand_over(const YAML::Node& mapping, const std::string& key,
                 const std::function<void(const std::string& json)>& read) const;

  [[noreturn]] void fail(const YAML::Node& at, const std::string& key,
                         const std::string& message) const;
  void finish() const;

 private:
  template <class T>
  void integer(const char* key, T& field);
  [[nodiscard]] double real(const YAML::Node& node, const char* key) const;
  [[nodiscard]] std::string text(const YAML::Node& node, const char* key,
                                 const char* expected) const;
  [[nodiscard]] std::string dotted(std::string_view key) const;

  YAML::Node node_;
  std::string prefix_;
  std::string file_;
  std::map<std::string, int>* lines_;
  std::vector<std::string> known_;
};

/// The candidate with the smallest edit distance; empty where none is near.
[[nodiscard]] std::string nearest_name(std::string_view name,
                                       const std::vector<std::string>& candidates);

}  // namespace meshloom::train::detail
