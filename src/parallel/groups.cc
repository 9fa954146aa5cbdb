#include "meshloom/parallel/groups.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {
namespace {

/// The ranks with the same `color`, by world rank. Collective.
comm::Communicator part_of(comm::Communicator& world, bool whole, int color, const char* name) {
  if (whole) return world;
  return *world.split(color, world.rank(), name);
}

Layout checked(const Layout& layout, const comm::Communicator& world) {
  MESHLOOM_CHECK_EQ(world.size(), layout.world_size(), "parallel.groups",
                    "ranks of the world and of the layout");
  return layout;
}

}  // namespace

Groups::Groups(comm::Communicator world, const ModelPlacement& placement)
    : layout_(checked(placement.layout, world)),
      at_(layout_.coordinates(world.rank())),
      world_(std::move(world)),
      hdp_(part_of(world_, layout_.tp * layout_.pp == 1, at_.pp * layout_.tp + at_.tp, "hdp")) {
  if (layout_.tp > 1) {
    tensor_ = part_of(world_, layout_.hdp * layout_.pp == 1, at_.pp * layout_.hdp + at_.hdp, "tp");
  }
  if (layout_.pp > 1) {
    pipeline_ = part_of(world_, layout_.hdp * layout_.tp == 1, at_.hdp * layout_.tp + at_.tp, "pp");
  }
  if (layout_.ep > 1) {
    experts_ = hdp_.split(at_.hdp / layout_.ep, at_.hdp, "ep");
  }
  for (const ReplicaSet set : kReplicaSets) {
    replicas_[static_cast<std::size_t>(set)] = make_replicas(set, placement);
  }
}

std::optional<Replicas> Groups::make_replicas(ReplicaSet set, const ModelPlacement& placement) {
  const ReplicaOrder some =
      placement.replicas(set, layout_.rank({.pp = placement.pieces.front().stage}));
  if (some.ranks.empty()) return std::nullopt;  // nobody has any
  const ReplicaOrder own = placement.replicas(set, world_.rank());
  const std::string name(to_string(set));
  const auto group_of = [&](std::size_t first, const std::string& level) {
    return world_.split(own.ranks.empty() ? -1 : own.ranks[first], world_.rank(), name + level);
  };
  if (some.nodes == 1) {
    if (set == ReplicaSet::kDense) return Replicas(hdp_);
    if (std::ssize(some.ranks) == world_.size()) return Replicas(world_);
    std::optional<comm::Communicator> group = group_of(0, "");
    return group ? std::optional(Replicas(*std::move(group))) : std::nullopt;
  }
  const auto found = std::find(own.ranks.begin(), own.ranks.end(), world_.rank());
  const auto nodes = static_cast<std::size_t>(some.nodes);
  const auto position = static_cast<std::size_t>(found - own.ranks.begin());
  const auto levels = [&](const std::string& kind) -> std::optional<ReplicaLevels> {
    std::optional<comm::Communicator> inside = group_of(position % nodes, kind + "_inside");
    std::optional<comm::Communicator> across = group_of(position / nodes * nodes, kind + "_across");
    if (!inside) return std::nullopt;
    return ReplicaLevels{.inside = *std::move(inside), .across = *std::move(across)};
  };
  std::optional<ReplicaLevels> sums = levels("_sums");
  std::optional<ReplicaLevels> gatherings = levels("_gatherings");
  if (!sums) return std::nullopt;
  return Replicas(*std::move(sums), *std::move(gatherings));
}

const Replicas& Groups::replicas(ReplicaSet set) const {
  const std::optional<Replicas>& found = replicas_[static_cast<std::size_t>(set)];
  MESHLOOM_CHECK(found.has_value(), "parallel.groups",
                 fmt::format("rank {} has no {} parameters", world_.rank(), to_string(set)));
  return *found;
}

}  // namespace meshloom::parallel
