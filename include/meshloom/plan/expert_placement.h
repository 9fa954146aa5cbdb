#pragma once

#include <span>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::plan {

/// Where experts may go. A place holds one expert; a rank has replicas / ranks places.
struct PlacementProblem {
  int replicas = 0;  ///< places in all, at least one for each expert
  int groups = 1;    ///< of neighbouring experts, which routing may limit a token to
  int nodes = 1;
  int ranks = 1;
};

/// Experts of one layer on their places, rank by rank.
struct ExpertPlacement {
  std::vector<int> expert;   ///< [replicas]: which expert a place holds
  std::vector<int> replica;  ///< [replicas]: which of that expert's replicas, from 0
  std::vector<int> count;    ///< [experts]: replicas of each expert
  friend bool operator==(const ExpertPlacement&, const ExpertPlacement&) = default;
};

/// Places experts by observed loads, as DeepSeek's EPLB does: groups are packed on nodes; within a
/// node the expert with the most load per replica gets the next replica; replicas are packed on
/// ranks. Packing gives the heaviest first to whom has least. Where groups do not divide by nodes,
/// groups and nodes do not count. A pure function; ties go to the lower number.
/// @param loads  of each expert, not negative
/// @throws InvalidArgument  sizes do not divide as they must, or there are fewer places than
///   experts; names them.
[[nodiscard]] MESHLOOM_API ExpertPlacement place_experts(std::span<const double> loads,
                                                         PlacementProblem problem);

}  // namespace meshloom::plan
