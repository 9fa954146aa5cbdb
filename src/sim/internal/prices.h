#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meshloom/mesh/rank_list.h"
#include "meshloom/plan/exchange_choice.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/sim/cluster.h"

namespace meshloom::sim::detail {

inline std::size_t as_size(int n) { return static_cast<std::size_t>(n); }

/// Facts of one unit that every member shares.
struct UnitFacts {
  double work = 0.0;
  double quadratic = 0.0;  ///< part of the work that is attention between tokens
  double tokens = 0.0;
  int degree = 1;
  Link ring;                  ///< slowest link between neighbours
  double share_inside = 0.0;  ///< of the ring's edges
  /// The unit's exchange, a layer, and the one whose weight gradients come later.
  std::optional<plan::ExchangeCandidate> exchange;
  std::optional<plan::ExchangeCandidate> deferred;
};

/// What one instruction costs the rank that runs it, and what it sends.
struct Price {
  double compute = 0.0;
  double exposed = 0.0;
  double inside = 0.0;   ///< bytes to ranks of the same node
  double between = 0.0;  ///< bytes to other nodes
};

/// A list of ranks that meet.
struct Group {
  RankList ranks;
  Link link;  ///< the slowest among them
  std::unordered_map<int, int> on_node;
};

/// One group for every list of ranks, however many copies of it the programs hold.
class Groups {
 public:
  explicit Groups(const Cluster& cluster) : cluster_(cluster) {}

  std::size_t of(const RankList& ranks) {
    const auto known = of_address_.find(&ranks.values());
    if (known != of_address_.end()) return known->second;
    const auto [found, added] = of_values_.emplace(ranks.values(), groups_.size());
    if (added) groups_.push_back(make(ranks));
    of_address_.emplace(&ranks.values(), found->second);
    return found->second;
  }
  const Group& operator[](std::size_t index) const { return groups_[index]; }

 private:
  [[nodiscard]] Group make(const RankList& ranks) const {
    Group group{.ranks = ranks, .link = cluster_.inside, .on_node = {}};
    for (const int rank : ranks) ++group.on_node[rank / cluster_.ranks_per_node];
    if (group.on_node.size() > 1) {
      // All ranks of a node are in groups like this one at the same time.
      group.link.bandwidth =
          std::min(group.link.bandwidth, cluster_.between_bandwidth(cluster_.ranks_per_node));
      group.link.latency = std::max(group.link.latency, cluster_.between.latency);
    }
    return group;
  }

  const Cluster& cluster_;
  std::vector<Group> groups_;
  std::unordered_map<const void*, std::size_t> of_address_;
  std::map<std::vector<int>, std::size_t> of_values_;
};

/// The cost model of a plan's programs on a cluster.
class Prices {
 public:
  Prices(const plan::StepPlan& plan, const Cluster& cluster, const Workload& workload);

  /// Of everything but transfers between stages.
  Price of(int rank, const plan::Instruction& instruction);
  /// Bytes of a transfer between stages.
  [[nodiscard]] double transfer(const plan::Instruction& instruction) const {
    return member_tokens(instruction) * workload_.hidden_bytes / plan_.layout.tp;
  }
  /// Activations that one piece of the model saves of a unit on one rank, and what stays on the
  /// device of them, in bytes. Zero where there is no unit.
  [[nodiscard]] double saved(const plan::Instruction& instruction) const;
  [[nodiscard]] double held(const plan::Instruction& instruction) const;

  Groups& groups() { return groups_; }

 private:
  /// Ring neighbours of the units of a slot on other nodes: how many of each node's ranks have one.
  [[nodiscard]] std::unordered_map<int, int> leaving(const plan::Slot& slot) const;
  [[nodiscard]] UnitFacts facts_of(const plan::Unit& unit,
                                   const std::unordered_map<int, int>& leaving) const;
  /// World ranks of ring member `at` and of whom it sends to, of the first tensor rank and stage.
  [[nodiscard]] std::pair<int, int> edge(const plan::Unit& unit, std::size_t at) const;
  [[nodiscard]] plan::ExchangeCandidate predict(const plan::Unit& unit, const UnitFacts& facts,
                                                bool deferred) const;
  [[nodiscard]] const UnitFacts* unit_of(const plan::Instruction& instruction) const;
  [[nodiscard]] double member_tokens(const plan::Instruction& instruction) const;
  [[nodiscard]] double piece_layers() const;
  Price compute(int rank, const plan::Instruction& instruction, double share, bool exchanges);
  /// Work of a rank's share of its slot, routed experts of its group included, without `fixed`.
  [[nodiscard]] double work_of(int rank, const plan::Instruction& instruction) const;
  [[nodiscard]] bool expert_parallel() const {
    return plan_.layout.ep > 1 && workload_.expert_share > 0.0;
  }
  void add_exchange(const plan::Instruction& instruction, Price& price);
  void add_meeting(int rank, const plan::Instruction& instruction,
                   const plan::Rendezvous& rendezvous, Price& price);
  void add_replicas(int rank, const plan::Instruction& instruction, Price& price);
  /// Rows of the stream to the other tensor ranks or back, `calls` times, `hidden` of them beside
  /// products.
  void add_rows(int rank, const plan::Instruction& instruction, const plan::Rendezvous& rendezvous,
                double calls, double hidden, Price& price);
  /// What ZeRO 2 and 3 move in a pass, layer by layer, one ahead of the computation.
  void add_sharded(int rank, const plan::Instruction& instruction,
                   const plan::Rendezvous& rendezvous, Price& price);
  /// What a group moves: counted, and its seconds.
  double add_group(int rank, const plan::Rendezvous& rendezvous, double bytes, double calls,
                   Price& price);
  /// Seconds of transfer beside `behind` seconds of computation that show.
  [[nodiscard]] double shown(double transfer, double behind) const {
    const double hidden = std::min(transfer, behind) * cluster_.overlap;
    return transfer - hidden;
  }

  const plan::StepPlan& plan_;
  const Cluster& cluster_;
  const Workload& workload_;
  Groups groups_;
  double pieces_;  ///< of the model, over stages and chunks
  std::unordered_map<std::int64_t, std::int64_t> tokens_;
  std::vector<std::vector<UnitFacts>> facts_;   ///< [slot][unit]
  std::vector<std::vector<double>> tokens_of_;  ///< [slot][hdp]; of expert-parallel plans
};

}  // namespace meshloom::sim::detail
