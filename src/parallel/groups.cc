#include "meshloom/parallel/groups.h"

#include <fmt/format.h>

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
  const auto set = [&](ReplicaSet which) -> std::optional<comm::Communicator>& {
    return replicas_[static_cast<std::size_t>(which)];
  };
  set(ReplicaSet::kDense) = hdp_;
  const int member = at_.hdp % layout_.ep;
  if (layout_.ep > 1) {
    experts_ = ExpertParallel{.group = *hdp_.split(at_.hdp / layout_.ep, at_.hdp, "ep"),
                              .map = placement.experts};
  }
  if (layout_.tp > 1) {
    set(ReplicaSet::kReplicated) = part_of(world_, layout_.pp == 1, at_.pp, "replicated");
    if (placement.config.kv_heads < layout_.tp) {
      const int copies = layout_.tp / static_cast<int>(placement.config.kv_heads);
      const int heads = layout_.tp / copies;
      set(ReplicaSet::kKeyValue) =
          *world_.split(at_.pp * heads + at_.tp / copies, world_.rank(), "key_value");
    }
  }
  if (layout_.ep * layout_.tp > 1) {
    set(ReplicaSet::kExpert) =
        part_of(world_, layout_.ep * layout_.pp == 1, at_.pp * layout_.ep + member, "experts");
  }
  if (placement.config.tie_word_embeddings && placement.pieces.size() > 1) {
    const int first = placement.pieces.front().stage;
    const int last = placement.pieces.back().stage;
    const bool holds = at_.pp == first || at_.pp == last;
    set(ReplicaSet::kTied) = world_.split(holds ? at_.tp : -1, world_.rank(), "tied");
  }
}

comm::Communicator& Groups::replicas(ReplicaSet set) {
  std::optional<comm::Communicator>& found = replicas_[static_cast<std::size_t>(set)];
  MESHLOOM_CHECK(found.has_value(), "parallel.groups",
                 fmt::format("rank {} has no {} parameters", world_.rank(), to_string(set)));
  return *found;
}

}  // namespace meshloom::parallel
