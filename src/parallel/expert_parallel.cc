#include "meshloom/parallel/expert_parallel.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {

ExpertMap::ExpertMap(std::vector<int> owners, int ranks) {
  MESHLOOM_CHECK_GE(ranks, 1, "parallel.expert_map", "members of an expert-parallel group");
  begin_.assign(static_cast<std::size_t>(ranks) + 1, 0);
  for (std::size_t e = 0; e < owners.size(); ++e) {
    MESHLOOM_CHECK(
        owners[e] >= 0 && owners[e] < ranks, "parallel.expert_map",
        fmt::format("expert {} is on member {}, expected 0 .. {}", e, owners[e], ranks - 1));
    ++begin_[static_cast<std::size_t>(owners[e]) + 1];
  }
  for (std::size_t r = 1; r < begin_.size(); ++r) begin_[r] += begin_[r - 1];
  std::vector<std::int64_t> next = begin_;
  expert_.resize(owners.size());
  place_.resize(owners.size());
  for (std::size_t e = 0; e < owners.size(); ++e) {
    place_[e] = next[static_cast<std::size_t>(owners[e])]++;
    expert_[static_cast<std::size_t>(place_[e])] = static_cast<std::int64_t>(e);
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

ExpertMap ExpertMap::rearranged(std::vector<std::int64_t> experts) const {
  ExpertMap result = *this;
  result.place_.assign(place_.size(), -1);
  for (std::size_t p = 0; p < experts.size(); ++p) {
    if (experts[p] < 0 || experts[p] >= this->experts()) continue;
    result.place_[static_cast<std::size_t>(experts[p])] = static_cast<std::int64_t>(p);
  }
  MESHLOOM_CHECK(
      experts.size() == expert_.size() &&
          std::find(result.place_.begin(), result.place_.end(), -1) == result.place_.end(),
      "parallel.expert_map",
      fmt::format("{} places do not hold each of {} experts once", experts.size(),
                  this->experts()));
  result.expert_ = std::move(experts);
  return result;
}

int ExpertMap::owner(std::int64_t expert) const {
  const std::int64_t place = place_.at(static_cast<std::size_t>(expert));
  const auto after = std::upper_bound(begin_.begin(), begin_.end(), place);
  return static_cast<int>(after - begin_.begin()) - 1;
}

std::span<const std::int64_t> ExpertMap::experts_of(int rank) const {
  const auto at = static_cast<std::size_t>(rank);
  const std::int64_t begin = begin_.at(at);
  return std::span(expert_).subspan(static_cast<std::size_t>(begin),
                                    static_cast<std::size_t>(begin_.at(at + 1) - begin));
}

}  // namespace meshloom::parallel
