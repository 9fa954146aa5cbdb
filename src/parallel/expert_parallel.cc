#include "meshloom/parallel/expert_parallel.h"

#include <fmt/format.h>

#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {

ExpertMap::ExpertMap(std::vector<int> owners, int ranks) : owners_(std::move(owners)) {
  MESHLOOM_CHECK_GE(ranks, 1, "parallel.expert_map", "members of an expert-parallel group");
  held_.resize(static_cast<std::size_t>(ranks));
  for (std::size_t e = 0; e < owners_.size(); ++e) {
    MESHLOOM_CHECK(
        owners_[e] >= 0 && owners_[e] < ranks, "parallel.expert_map",
        fmt::format("expert {} is on member {}, expected 0 .. {}", e, owners_[e], ranks - 1));
    held_[static_cast<std::size_t>(owners_[e])].push_back(static_cast<std::int64_t>(e));
  }
}

ExpertMap ExpertMap::even(std::int64_t experts, int ranks) {
  std::vector<int> owners(static_cast<std::size_t>(experts));
  for (std::int64_t r = 0; r < ranks; ++r) {
    for (auto e = experts * r / ranks; e < experts * (r + 1) / ranks; ++e) {
      owners[static_cast<std::size_t>(e)] = static_cast<int>(r);
    }
  }
  return {std::move(owners), ranks};
}

std::optional<ExpertParallel> make_expert_parallel(comm::Communicator hdp, const Layout& layout,
                                                   std::int64_t experts) {
  layout.validate();
  MESHLOOM_CHECK_EQ(hdp.size(), layout.hdp, "parallel.expert_parallel", "ranks of the HDP axis");
  if (layout.ep == 1) return std::nullopt;
  const int group = hdp.rank() / layout.ep;
  const int member = hdp.rank() % layout.ep;
  auto neighbours = hdp.split(group, hdp.rank(), "ep");
  auto replicas = hdp.split(member, hdp.rank(), "experts");
  return ExpertParallel{.group = *std::move(neighbours),
                        .replicas = *std::move(replicas),
                        .map = ExpertMap::even(experts, layout.ep)};
}

}  // namespace meshloom::parallel
