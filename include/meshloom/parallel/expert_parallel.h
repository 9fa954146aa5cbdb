#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::parallel {

/// Where the routed experts of one layer are: every expert is held once, by a member of the
/// expert-parallel group, in a place of its own; places are counted member by member. The same in
/// all groups.
class MESHLOOM_API ExpertMap {
 public:
  /// A member's experts lie in ascending order.
  /// @param owners  member of each expert @param ranks  members of a group
  /// @throws InvalidArgument  an owner outside 0 .. ranks - 1; names the expert.
  ExpertMap(std::vector<int> owners, int ranks);
  /// Member r holds experts [floor(E r / ranks), floor(E (r + 1) / ranks)): numbers differ by at
  /// most one, and with fewer experts than members some hold none.
  [[nodiscard]] static ExpertMap even(std::int64_t experts, int ranks);
  /// As many experts on each member, at other places.
  /// @param experts  the expert at each place
  /// @throws InvalidArgument  not each expert once.
  [[nodiscard]] ExpertMap rearranged(std::vector<std::int64_t> experts) const;

  [[nodiscard]] std::int64_t experts() const { return static_cast<std::int64_t>(place_.size()); }
  [[nodiscard]] int ranks() const { return static_cast<int>(begin_.size()) - 1; }
  [[nodiscard]] int owner(std::int64_t expert) const;
  /// The expert at each place, [experts].
  [[nodiscard]] const std::vector<std::int64_t>& by_place() const { return expert_; }
  /// The place of each expert, [experts].
  [[nodiscard]] const std::vector<std::int64_t>& places() const { return place_; }
  /// The experts of a member, by place.
  [[nodiscard]] std::span<const std::int64_t> experts_of(int rank) const;
  /// Whether each member holds as many experts as in `other`.
  [[nodiscard]] bool same_numbers(const ExpertMap& other) const { return begin_ == other.begin_; }

  friend bool operator==(const ExpertMap&, const ExpertMap&) = default;

 private:
  std::vector<std::int64_t> begin_;   ///< first place of each member, and the number of places
  std::vector<std::int64_t> expert_;  ///< by place
  std::vector<std::int64_t> place_;   ///< by expert
};

}  // namespace meshloom::parallel
