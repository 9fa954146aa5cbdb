#pragma once

#include <optional>
#include <string>

#include "meshloom/train/config.h"

namespace meshloom::train::detail {

/// A value out of range: the dotted key and what is wrong with it.
struct ConfigIssue {
  std::string key;
  std::string message;
};

/// The first value that is out of range.
[[nodiscard]] std::optional<ConfigIssue> find_issue(const TrainConfig& config);

}  // namespace meshloom::train::detail
