#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace meshloom::comm::detail {

/// `members`, ranks of a group, as ranks of its world. @param parents  the group's ranks of the
/// world
[[nodiscard]] inline std::vector<int> world_ranks(const std::vector<int>& parents,
                                                  const std::vector<int>& members) {
  std::vector<int> result;
  for (const int member : members) result.push_back(parents[member]);
  return result;
}

/// Puts a new group under its parent, whose abort then reaches it; one whose parent is aborted
/// already is aborted at once. A backend's `State` has mutex, aborted, reason and children.
template <class State, class Child>
void attach_child(State& parent, Child& child, const std::shared_ptr<State>& child_state) {
  std::string reason;
  {
    const std::lock_guard lock(parent.mutex);
    if (parent.aborted) reason = parent.reason;
    std::erase_if(parent.children, [](const auto& other) { return other.expired(); });
    parent.children.push_back(child_state);
  }
  if (!reason.empty()) child.abort(reason);
}

}  // namespace meshloom::comm::detail
