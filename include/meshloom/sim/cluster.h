#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/exchange_traffic.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::sim {

/// One direction of a connection: a message of b bytes takes latency + b / bandwidth.
struct Link {
  double bandwidth = 0.0;  ///< bytes per second, > 0
  double latency = 0.0;    ///< seconds
  [[nodiscard]] double seconds(double bytes) const { return latency + bytes / bandwidth; }
  friend bool operator==(const Link&, const Link&) = default;
};

/// The machines. World ranks fill nodes in order.
struct MESHLOOM_API Cluster {
  int ranks_per_node = 8;
  int nodes = 0;              ///< 0: as many as the ranks need
  double compute_rate = 1.0;  ///< of every rank, against what the workload's times were taken on
  std::map<int, double> slow_ranks;                   ///< world rank -> part of that rate
  Link inside{.bandwidth = 200e9, .latency = 5e-6};   ///< between ranks of one node
  Link between{.bandwidth = 25e9, .latency = 15e-6};  ///< between nodes, per rank
  /// Bytes per second that all ranks of a node together send to other nodes; 0: no limit but
  /// theirs.
  double node_bandwidth = 0.0;
  Link host{.bandwidth = 25e9, .latency = 10e-6};  ///< device to host memory, per rank
  double loader_seconds = 0.0;                     ///< of one kLoad that a rank has to wait for
  /// Part of a transfer between ranks that goes on behind computation where there is some; the rest
  /// takes computation's place, as where the same processors move bytes and compute.
  double overlap = 1.0;

  /// A mapping with these fields over those of `base`; links are {bandwidth: , latency: }. A
  /// `workload` mapping beside them is `Workload::from_yaml`'s.
  /// @throws DataError  not YAML, an unknown key, a wrong type or range; names `name` and key.
  [[nodiscard]] static Cluster from_yaml(const std::string& text, const std::string& name);
  [[nodiscard]] static Cluster from_yaml(const std::string& text, const std::string& name,
                                         const Cluster& base);
  /// @throws IoError  the file cannot be read. @throws DataError
  [[nodiscard]] static Cluster load(const std::string& path);

  [[nodiscard]] const Link& link(int rank, int peer) const {
    return rank / ranks_per_node == peer / ranks_per_node ? inside : between;
  }
  /// Bytes per second to other nodes of each of `senders` of one node.
  [[nodiscard]] double between_bandwidth(int senders) const {
    if (node_bandwidth <= 0.0) return between.bandwidth;
    return std::min(between.bandwidth, node_bandwidth / std::max(1, senders));
  }
  [[nodiscard]] double rate_of(int rank) const {
    const auto slow = slow_ranks.find(rank);
    return slow == slow_ranks.end() ? compute_rate : compute_rate * slow->second;
  }
};

/// What the programs move and compute: the model as the simulator sees it.
struct MESHLOOM_API Workload {
  int layers = 32;
  /// Seconds of one unit of the plan's work, forward and backward of the whole model on one rank
  /// (tensor parallelism divides it).
  double seconds_per_work = 1.0;
  double forward_share = 1.0 / 3.0;          ///< of that, spent in forward
  double weight_gradient_share = 1.0 / 3.0;  ///< of that, spent on weight gradients
  /// Heads and bytes of attention, which exchanges move: those of a 7B model with 8 K/V heads.
  plan::ExchangeShape attention{.heads = 32,
                                .key_value_heads = 8,
                                .head_dim = 128,
                                .window = 0,
                                .element_bytes = 2,
                                .wire_bytes = 2,
                                .statistic_bytes = 4};
  double hidden_bytes = 8192.0;         ///< of one token between stages
  double saved_bytes = 65536.0;         ///< of one token and layer, kept from forward to backward
  double parameter_bytes = 14e9;        ///< of the whole model as gathered, but for routed experts
  double gradient_bytes = 28e9;         ///< of the whole model as reduced, but for routed experts
  double expert_parameter_bytes = 0.0;  ///< of all routed experts
  double expert_gradient_bytes = 0.0;
  /// What ranks shard where the plan is in lockstep over the HDP axis: 2 gradients, 3 parameters,
  /// too.
  int zero = 3;
  double mixture_share = 0.0;  ///< of the layers: mixtures of experts
  std::string recompute =
      "none";                   ///< traffic of forward that backward repeats: none, selective, full
  double dispatch_bytes = 0.0;  ///< of one token, layer and direction to other experts' ranks
  /// Part of the work that is linear in tokens which goes where tokens are dispatched to, evenly
  /// over an expert-parallel group.
  double expert_share = 0.0;
  /// Part of the computation that each pipeline stage has; empty: even.
  std::vector<double> stage_shares{};
  double step_seconds = 0.0;  ///< optimizer update, and what a step does beside its instructions

  /// The `workload` mapping of a cluster file over the fields of `base`; `base` where there is
  /// none.
  /// @throws DataError  an unknown key, a wrong type or range; names `name` and key.
  [[nodiscard]] static Workload from_yaml(const std::string& text, const std::string& name,
                                          const Workload& base);

  /// The 7B model of [BS fig. 6]: attention 0.00925 S^2 + 0.156 S ms a layer, MLP 0.227 S ms, S in
  /// thousands of tokens, with the coefficients of `cost` scaled to them.
  [[nodiscard]] static Workload llama_7b();
  /// The cost model in whose units `llama_7b` counts: seconds, forward and backward, all layers.
  [[nodiscard]] static CostModel llama_7b_cost();
};

}  // namespace meshloom::sim
