#include "meshloom/plan/expert_replan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <optional>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/plan/expert_placement.h"

namespace meshloom::plan {
namespace {

constexpr const char* kReplanWhere = "plan.replan_experts";
/// Loads that differ by less, relatively, are equal: sums of the same numbers in another order.
constexpr double kEqual = 1e-12;

/// Items on bins, of which each keeps its number of items: they only change places with each other.
struct Spread {
  std::vector<double> weight;  ///< of each item
  std::vector<int> bin;        ///< of each item
  std::vector<double> load;    ///< of each bin

  Spread(std::vector<double> weights, std::vector<int> bins, int count)
      : weight(std::move(weights)), bin(std::move(bins)), load(static_cast<std::size_t>(count)) {
    for (std::size_t i = 0; i < bin.size(); ++i) load_of(i) += weight[i];
  }
  double& load_of(std::size_t item) { return load[static_cast<std::size_t>(bin[item])]; }
  /// The heavier one of two items' bins, were they exchanged.
  double exchanged(std::size_t a, std::size_t b) {
    const double shift = weight[a] - weight[b];
    return std::max(load_of(a) - shift, load_of(b) + shift);
  }
  void exchange(std::size_t a, std::size_t b) {
    const double shift = weight[a] - weight[b];
    load_of(a) -= shift;
    load_of(b) += shift;
    std::swap(bin[a], bin[b]);
  }
};

/// Exchanges that make the heaviest bin lighter, the best one first, until there is none.
void level(Spread& items) {
  while (true) {
    const auto heavy = std::max_element(items.load.begin(), items.load.end());
    const int bin = static_cast<int>(heavy - items.load.begin());
    double best = *heavy * (1.0 - kEqual);
    std::optional<std::pair<std::size_t, std::size_t>> found;
    for (std::size_t a = 0; a < items.bin.size(); ++a) {
      for (std::size_t b = 0; items.bin[a] == bin && b < items.bin.size(); ++b) {
        if (items.bin[b] == bin || items.exchanged(a, b) >= best) continue;
        best = items.exchanged(a, b);
        found = {a, b};
      }
    }
    if (!found) return;
    items.exchange(found->first, found->second);
  }
}

/// Exchanges that bring items home and leave no bin heavier than the heaviest.
void settle(Spread& items, const std::vector<int>& home) {
  const double most = *std::max_element(items.load.begin(), items.load.end()) * (1.0 + kEqual);
  for (bool again = true; again;) {
    again = false;
    for (std::size_t a = 0; a < items.bin.size(); ++a) {
      for (std::size_t b = a + 1; b < items.bin.size(); ++b) {
        const int left = items.bin[a];
        const int right = items.bin[b];
        const auto at_home = [&](int bin_a, int bin_b) {
          return static_cast<int>(home[a] == bin_a) + static_cast<int>(home[b] == bin_b);
        };
        if (at_home(right, left) <= at_home(left, right) || items.exchanged(a, b) > most) continue;
        items.exchange(a, b);
        again = true;
      }
    }
  }
}

/// Gives packs the labels under which most of their items are at home, the surest first.
/// @param common  [packs][labels]: items of the pack whose home is the label
/// @returns the label of each pack
std::vector<int> label_packs(const std::vector<std::vector<int>>& common) {
  const std::size_t count = common.size();
  std::vector<int> label(count, -1);
  std::vector<bool> taken(count, false);
  for (std::size_t turn = 0; turn < count; ++turn) {
    int most = -1;
    std::pair<std::size_t, std::size_t> best;
    for (std::size_t p = 0; p < count; ++p) {
      for (std::size_t l = 0; label[p] < 0 && l < count; ++l) {
        if (taken[l] || common[p][l] <= most) continue;
        most = common[p][l];
        best = {p, l};
      }
    }
    label[best.first] = static_cast<int>(best.second);
    taken[best.second] = true;
  }
  return label;
}

class Replanner {
 public:
  Replanner(std::span<const double> loads, const HeldExperts& now, int groups, int nodes)
      : loads_(loads.begin(), loads.end()), now_(now), groups_(groups), nodes_(nodes) {
    home_.resize(loads_.size());
    std::size_t place = 0;
    for (int member = 0; member < members(); ++member) {
      for (int i = 0; i < now_.held[static_cast<std::size_t>(member)]; ++i) {
        home_[static_cast<std::size_t>(now_.expert[place++])] = member;
      }
    }
    if (!groups_are_whole()) groups_ = nodes_ = 1;
  }

  std::vector<int> run() {
    std::vector<int> best = improve(home_);
    std::vector<std::vector<int>> others;
    if (nodes_ > 1) others.push_back(exchange_groups());
    if (auto packed = pack_anew()) others.push_back(std::move(*packed));
    for (std::vector<int>& start : others) {
      std::vector<int> other = improve(std::move(start));
      const double before = busiest(best);
      const double after = busiest(other);
      const bool equal = std::abs(before - after) <= kEqual * before;
      if (equal ? moves(other) < moves(best) : after < before) best = std::move(other);
    }
    return places(best);
  }

 private:
  [[nodiscard]] int members() const { return static_cast<int>(now_.held.size()); }
  [[nodiscard]] int node_of(int member) const { return member / (members() / nodes_); }
  [[nodiscard]] std::size_t group_of(std::size_t expert) const {
    return expert / (loads_.size() / static_cast<std::size_t>(groups_));
  }

  [[nodiscard]] bool groups_are_whole() const {
    const auto experts = static_cast<int>(loads_.size());
    if (nodes_ < 2 || members() % nodes_ != 0) return false;
    if (groups_ % nodes_ != 0 || experts % groups_ != 0) return false;
    std::vector<int> held(static_cast<std::size_t>(nodes_), 0);
    for (std::size_t e = 0; e < loads_.size(); ++e) {
      const std::size_t first = group_of(e) * (loads_.size() / static_cast<std::size_t>(groups_));
      if (node_of(home_[e]) != node_of(home_[first])) return false;
      ++held[static_cast<std::size_t>(node_of(home_[e]))];
    }
    return std::all_of(held.begin(), held.end(), [&](int n) { return n == experts / nodes_; });
  }

  /// The present placement, after groups were levelled over nodes: those that came take the places
  /// of those that went.
  [[nodiscard]] std::vector<int> exchange_groups() const {
    std::vector<double> weight(static_cast<std::size_t>(groups_), 0.0);
    std::vector<int> node(weight.size());
    for (std::size_t e = 0; e < loads_.size(); ++e) {
      weight[group_of(e)] += loads_[e];
      node[group_of(e)] = node_of(home_[e]);
    }
    Spread spread(std::move(weight), node, nodes_);
    level(spread);
    settle(spread, node);
    std::vector<int> result = home_;
    std::vector<std::vector<int>> free(static_cast<std::size_t>(nodes_));
    for (std::size_t e = 0; e < loads_.size(); ++e) {
      const int former = node_of(home_[e]);
      if (spread.bin[group_of(e)] != former)
        free[static_cast<std::size_t>(former)].push_back(home_[e]);
    }
    for (std::size_t e = loads_.size(); e-- > 0;) {
      const int target = spread.bin[group_of(e)];
      if (target == node_of(home_[e])) continue;
      std::vector<int>& places = free[static_cast<std::size_t>(target)];
      result[e] = places.back();
      places.pop_back();
    }
    return result;
  }

  /// What EPLB makes of the loads; nothing where members hold unequal numbers.
  [[nodiscard]] std::optional<std::vector<int>> pack_anew() const {
    const int each = now_.held.front();
    if (each == 0 ||
        std::any_of(now_.held.begin(), now_.held.end(), [&](int n) { return n != each; })) {
      return std::nullopt;
    }
    const ExpertPlacement packed =
        place_experts(loads_, {.replicas = static_cast<int>(loads_.size()),
                               .groups = groups_,
                               .nodes = nodes_,
                               .ranks = members()});
    std::vector<int> pack(loads_.size());
    for (std::size_t place = 0; place < packed.expert.size(); ++place) {
      pack[static_cast<std::size_t>(packed.expert[place])] = static_cast<int>(place) / each;
    }
    const auto count = [&](int from, int size, int to, const auto& unit_of) {
      std::vector<std::vector<int>> common(static_cast<std::size_t>(size),
                                           std::vector<int>(static_cast<std::size_t>(size), 0));
      for (std::size_t e = 0; e < pack.size(); ++e) {
        const int p = unit_of(pack[e]) - from;
        const int l = unit_of(home_[e]) - to;
        if (p < 0 || p >= size || l < 0 || l >= size) continue;
        ++common[static_cast<std::size_t>(p)][static_cast<std::size_t>(l)];
      }
      return common;
    };
    const std::vector<int> node =
        label_packs(count(0, nodes_, 0, [&](int member) { return node_of(member); }));
    const int size = members() / nodes_;
    std::vector<int> label(now_.held.size());
    for (int n = 0; n < nodes_; ++n) {
      const int from = n * size;
      const int to = node[static_cast<std::size_t>(n)] * size;
      const std::vector<int> inside = label_packs(count(from, size, to, [](int m) { return m; }));
      for (int m = 0; m < size; ++m) {
        label[static_cast<std::size_t>(from + m)] = to + inside[static_cast<std::size_t>(m)];
      }
    }
    for (int& member : pack) member = label[static_cast<std::size_t>(member)];
    return pack;
  }

  /// Levels the members of each node, then lets experts stay where that costs nothing.
  [[nodiscard]] std::vector<int> improve(std::vector<int> member) const {
    const int size = members() / nodes_;
    for (int node = 0; node < nodes_; ++node) {
      std::vector<std::size_t> experts;
      std::vector<double> weight;
      std::vector<int> bin;
      std::vector<int> home;
      for (std::size_t e = 0; e < loads_.size(); ++e) {
        if (node_of(member[e]) != node) continue;
        experts.push_back(e);
        weight.push_back(loads_[e]);
        bin.push_back(member[e] - node * size);
        home.push_back(home_[e] - node * size);
      }
      Spread spread(std::move(weight), std::move(bin), size);
      level(spread);
      settle(spread, home);
      for (std::size_t i = 0; i < experts.size(); ++i) {
        member[experts[i]] = node * size + spread.bin[i];
      }
    }
    return member;
  }

  [[nodiscard]] double busiest(const std::vector<int>& member) const {
    const Spread spread(loads_, member, members());
    return *std::max_element(spread.load.begin(), spread.load.end());
  }
  [[nodiscard]] int moves(const std::vector<int>& member) const {
    int result = 0;
    for (std::size_t e = 0; e < member.size(); ++e) result += member[e] != home_[e] ? 1 : 0;
    return result;
  }

  /// Who stays keeps the place; newcomers take those that are free, in order.
  [[nodiscard]] std::vector<int> places(const std::vector<int>& member) const {
    std::vector<std::vector<int>> coming(now_.held.size());
    for (std::size_t e = loads_.size(); e-- > 0;) {
      if (member[e] == home_[e]) continue;
      coming[static_cast<std::size_t>(member[e])].push_back(static_cast<int>(e));
    }
    std::vector<int> result = now_.expert;
    for (int& expert : result) {
      const auto before = static_cast<std::size_t>(expert);
      if (member[before] == home_[before]) continue;
      std::vector<int>& next = coming[static_cast<std::size_t>(home_[before])];
      expert = next.back();
      next.pop_back();
    }
    return result;
  }

  std::vector<double> loads_;
  const HeldExperts& now_;
  int groups_;
  int nodes_;
  std::vector<int> home_;  ///< member of each expert, now
};

void check_held(std::span<const double> loads, const HeldExperts& now, const char* where) {
  const auto experts = static_cast<int>(loads.size());
  MESHLOOM_CHECK(!now.held.empty() &&
                     std::all_of(now.held.begin(), now.held.end(), [](int n) { return n >= 0; }) &&
                     std::accumulate(now.held.begin(), now.held.end(), 0) == experts,
                 where, fmt::format("{} members do not hold {} experts", now.held.size(), experts));
  std::vector<int> sorted = now.expert;
  std::sort(sorted.begin(), sorted.end());
  std::vector<int> all(loads.size());
  std::iota(all.begin(), all.end(), 0);
  MESHLOOM_CHECK(sorted == all, where,
                 fmt::format("the places do not hold each of {} experts once", experts));
  for (std::size_t e = 0; e < loads.size(); ++e) {
    MESHLOOM_CHECK(std::isfinite(loads[e]) && loads[e] >= 0.0, where,
                   fmt::format("load of expert {} is {}", e, loads[e]));
  }
}

}  // namespace

double member_imbalance(std::span<const double> loads, const HeldExperts& placed) {
  check_held(loads, placed, "plan.member_imbalance");
  double busiest = 0.0;
  double all = 0.0;
  auto next = placed.expert.begin();
  for (const int held : placed.held) {
    double load = 0.0;
    for (const auto end = next + held; next != end; ++next) {
      load += loads[static_cast<std::size_t>(*next)];
    }
    busiest = std::max(busiest, load);
    all += load;
  }
  return all > 0.0 ? busiest * static_cast<double>(placed.held.size()) / all : 1.0;
}

std::vector<int> replan_experts(std::span<const double> loads, const HeldExperts& now, int groups,
                                int nodes) {
  check_held(loads, now, kReplanWhere);
  MESHLOOM_CHECK(groups >= 1 && nodes >= 1, kReplanWhere,
                 fmt::format("{} groups of experts on {} nodes", groups, nodes));
  return Replanner(loads, now, groups, nodes).run();
}

}  // namespace meshloom::plan
