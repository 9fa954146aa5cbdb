#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/mesh/layout.h"

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
  comm::Communicator group;     ///< `ep` neighbours of the HDP axis that share out the experts
  comm::Communicator replicas;  ///< the hdp / ep ranks that hold the same experts
  ExpertMap map;
};

/// Splits the HDP axis into groups of layout.ep neighbours. Collective over `hdp`.
/// @param experts  of a layer; 0 for a dense model
/// @returns nothing for ep = 1.
/// @throws InvalidArgument  `hdp` has another size than the layout's.
[[nodiscard]] MESHLOOM_API std::optional<ExpertParallel> make_expert_parallel(
    comm::Communicator hdp, const Layout& layout, std::int64_t experts);

}  // namespace meshloom::parallel
