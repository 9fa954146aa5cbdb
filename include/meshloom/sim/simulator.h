#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/sim/cluster.h"

namespace meshloom::sim {

/// One instruction of one rank: it computes from `begin`, moves what computation does not hide, and
/// waits for its rendezvous until `end`.
struct SimulatedSpan {
  int rank = 0;
  plan::Op op = plan::Op::kLoad;
  int slot = -1;
  int unit = -1;
  int chunk = 0;
  double begin = 0.0;
  double compute = 0.0;  ///< seconds of computation
  double exposed = 0.0;  ///< seconds of communication that computation did not hide
  double end = 0.0;      ///< the rest up to here is waiting for peers
};

struct SimulateOptions {
  bool spans = true;  ///< keep every span; off for tens of thousands of ranks
};

/// All times in seconds, bytes as sent.
struct MESHLOOM_API Simulation {
  double step_time = 0.0;
  std::vector<double> finish;       ///< [world]
  std::vector<double> busy;         ///< [world] computation
  std::vector<double> exposed;      ///< [world] unhidden communication
  std::vector<double> peak_memory;  ///< [world] bytes of saved activations
  double bytes_inside = 0.0;        ///< between ranks of one node
  double bytes_between = 0.0;       ///< between nodes
  double bytes_host = 0.0;          ///< offloaded and loaded back
  std::vector<SimulatedSpan> spans;

  /// Mean over ranks of time without computation, as a fraction of the step.
  [[nodiscard]] double bubble() const;
};

/// Runs the programs of all ranks on a cost model: discrete events, one per instruction and
/// rendezvous. Computation follows the plan's cost model, ring exchanges hide behind attention
/// ([BS 5.2]: what is exposed is transfer beyond the computation of the same ring step), grouped
/// traffic takes its slowest link.
/// @throws InvalidArgument  programs are not those of the plan's layout.
/// @throws PlanError        the programs can't finish; names the ranks and instructions that wait.
[[nodiscard]] MESHLOOM_API Simulation simulate(const plan::StepPlan& plan,
                                               const std::vector<plan::Program>& programs,
                                               const Cluster& cluster, const Workload& workload,
                                               const SimulateOptions& options = {});

}  // namespace meshloom::sim
