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

}  // namespace meshloom::parallel
