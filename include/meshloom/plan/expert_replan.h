#pragma once

#include <span>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::plan {

/// One layer's experts, each held once, on the members of an expert-parallel group.
struct HeldExperts {
  std::vector<int> expert;  ///< which expert a place holds, [experts]; places member by member
  std::vector<int> held;    ///< places of each member, [members]
};

/// Load of the busiest member over the members' mean; 1 where there is no load.
/// @param loads  of each expert, [experts]
[[nodiscard]] MESHLOOM_API double member_imbalance(std::span<const double> loads,
                                                   const HeldExperts& placed);

/// Other places for a layer's experts that even out the loads of its members, each holding as many
/// experts as before. Plans are made from several starts, and that with the lightest busiest member
/// is taken, of equal ones that with the fewest moves. The starts: the present placement; with
/// nodes, that after exchanges of groups between them; and what `place_experts` (EPLB) does without
/// replicas, its packs on the members that hold most of them already. From each, experts of two
/// members are exchanged as long as the busiest member gets lighter, then back where it can do
/// without. So no exchange is for nothing, and the busiest member is never busier than under EPLB
/// or the present placement. A pure function.
/// @param loads   of each expert, not negative, [experts]
/// @param groups  of neighbouring experts to which routing limits a token
/// @param nodes   of neighbouring members; where each has as many groups, all of them whole, groups
///   are spread over nodes first and then a node's experts over its members. Otherwise groups and
///   nodes do not count.
/// @returns the expert of each place. One that stays with its member keeps its place.
/// @throws InvalidArgument  `now` does not hold every expert once, or a load is negative or not
///   finite.
[[nodiscard]] MESHLOOM_API std::vector<int> replan_experts(std::span<const double> loads,
                                                           const HeldExperts& now, int groups = 1,
                                                           int nodes = 1);

}  // namespace meshloom::plan
