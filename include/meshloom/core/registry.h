#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"

namespace meshloom {

/// Name -> factory for one replaceable interface. Filled explicitly (`register_builtins`), never by
/// static objects; unknown names list the known ones. Thread safe.
template <class Interface, class... Args>
class Registry {
 public:
  using Factory = std::function<std::shared_ptr<Interface>(Args...)>;

  explicit Registry(std::string kind) : kind_(std::move(kind)) {}

  /// @throws InvalidArgument  the name is taken; the registry is unchanged.
  void add(const std::string& name, Factory factory) {
    const std::lock_guard lock(mutex_);
    if (!factories_.emplace(name, std::move(factory)).second) {
      throw InvalidArgument(kind_, "the name \"" + name + "\" is already registered");
    }
  }

  /// @throws InvalidArgument  unknown name; the message lists the known ones.
  [[nodiscard]] std::shared_ptr<Interface> create(const std::string& name, Args... args) const {
    Factory factory;
    {
      const std::lock_guard lock(mutex_);
      const auto found = factories_.find(name);
      if (found == factories_.end()) {
        std::string known;
        for (const auto& entry : factories_) known += (known.empty() ? "" : ", ") + entry.first;
        throw InvalidArgument(kind_, "unknown name \"" + name + "\"; known: " + known);
      }
      factory = found->second;
    }
    return factory(std::forward<Args>(args)...);
  }

  [[nodiscard]] std::vector<std::string> names() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> result;
    for (const auto& entry : factories_) result.push_back(entry.first);
    return result;
  }

 private:
  std::string kind_;
  mutable std::mutex mutex_;
  std::map<std::string, Factory> factories_;
};

}  // namespace meshloom
