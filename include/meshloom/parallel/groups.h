#pragma once

#include <array>
#include <optional>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/replicas.h"

namespace meshloom::parallel {

/// The fixed groups of one rank: real communicators, made once. A group that would be the world is
/// the world.
class MESHLOOM_API Groups {
 public:
  /// Collective over `world`.
  /// @throws InvalidArgument  `world` has another size than the layout's.
  Groups(comm::Communicator world, const ModelPlacement& placement);

  [[nodiscard]] const Layout& layout() const { return layout_; }
  [[nodiscard]] const Coordinates& at() const { return at_; }
  [[nodiscard]] comm::Communicator& world() { return world_; }
  /// Ranks of one stage and tensor-parallel place, by HDP rank.
  [[nodiscard]] comm::Communicator& hdp() { return hdp_; }
  /// Ranks that split one stage's weights, by tp rank; where tp > 1.
  [[nodiscard]] comm::Communicator& tensor() { return tensor_.value(); }
  /// Ranks that pass activations on, by stage; where pp > 1.
  [[nodiscard]] comm::Communicator& pipeline() { return pipeline_.value(); }
  /// The `ep` neighbours of the HDP axis that share out the experts; where ep > 1.
  [[nodiscard]] const std::optional<comm::Communicator>& experts() const { return experts_; }
  /// Who shares parameters of that kind with this rank. @throws InvalidArgument  nobody does.
  [[nodiscard]] const Replicas& replicas(ReplicaSet set) const;

 private:
  [[nodiscard]] std::optional<Replicas> make_replicas(ReplicaSet set,
                                                      const ModelPlacement& placement);

  Layout layout_;
  Coordinates at_;
  comm::Communicator world_;
  comm::Communicator hdp_;
  std::optional<comm::Communicator> tensor_;
  std::optional<comm::Communicator> pipeline_;
  std::optional<comm::Communicator> experts_;
  std::array<std::optional<Replicas>, kReplicaSets.size()> replicas_;
};

}  // namespace meshloom::parallel
