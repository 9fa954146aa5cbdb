#pragma once

#include <cstdint>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace meshloom::parallel {

/// Which member of an expert-parallel group holds which expert; every expert is held once. The same
/// on all ranks and for all layers.
class MESHLOOM_API ExpertMap {
 public:
  /// @param owners  member of each expert @param ranks  members of a group
  /// @throws InvalidArgument  an owner outside 0 .. ranks - 1; names the expert.
  ExpertMap(std::vector<int> owners, int ranks);
  /// Member r holds experts [floor(E r / ranks), floor(E (r + 1) / ranks)): numbers differ by at
  /// most one, and with fewer experts than members some hold none.
  [[nodiscard]] static ExpertMap even(std::int64_t experts, int ranks);

  [[nodiscard]] std::int64_t experts() const { return static_cast<std::int64_t>(owners_.size()); }
  [[nodiscard]] int ranks() const { return static_cast<int>(held_.size()); }
  [[nodiscard]] int owner(std::int64_t expert) const {
    return owners_.at(static_cast<std::size_t>(expert));
  }
  /// The experts of a member, ascending.
  [[nodiscard]] const std::vector<std::int64_t>& experts_of(int rank) const {
    return held_.at(static_cast<std::size_t>(rank));
  }

 private:
  std::vector<int> owners_;
  std::vector<std::vector<std::int64_t>> held_;
};

/// Expert parallelism as one rank sees it.
struct ExpertParallel {
  comm::Communicator group;  ///< `ep` neighbours of the HDP axis that share out the experts
  ExpertMap map;
};

}  // namespace meshloom::parallel
