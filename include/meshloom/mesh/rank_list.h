#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

namespace meshloom {

/// An ordered, immutable list of ranks. Copies share one buffer, so that the programs of thousands
/// of ranks can each name a group of thousands.
class RankList {
 public:
  RankList() = default;
  RankList(std::vector<int> ranks)  // NOLINT(google-explicit-constructor): a value like any other
      : ranks_(std::make_shared<const std::vector<int>>(std::move(ranks))) {}
  RankList(std::initializer_list<int> ranks) : RankList(std::vector<int>(ranks)) {}

  [[nodiscard]] const std::vector<int>& values() const {
    static const std::vector<int> empty;
    return ranks_ ? *ranks_ : empty;
  }
  [[nodiscard]] std::size_t size() const { return values().size(); }
  [[nodiscard]] bool empty() const { return values().empty(); }
  [[nodiscard]] int operator[](std::size_t index) const { return values()[index]; }
  [[nodiscard]] int front() const { return values().front(); }
  [[nodiscard]] auto begin() const { return values().begin(); }
  [[nodiscard]] auto end() const { return values().end(); }

  friend bool operator==(const RankList& a, const RankList& b) {
    return a.ranks_ == b.ranks_ || a.values() == b.values();
  }

 private:
  std::shared_ptr<const std::vector<int>> ranks_;
};

}  // namespace meshloom
