#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/train/config.h"

namespace meshloom::train::detail {

/// Ranks by host.
struct Hosts {
  int local_rank = 0;
  int local_size = 1;
  int ranks_per_host = 0;          ///< 0: one host, or hosts with unequal or scattered ranks
  std::vector<std::string> names;  ///< of the hosts, in order of their first rank
  std::vector<int> host_of;        ///< index in `names`, by rank
};
/// Collective.
[[nodiscard]] Hosts find_hosts(comm::Communicator& world);

/// "cpu", "cuda" (by local rank) or "cuda:N".
/// @throws NotSupported  this LibTorch has no CUDA, or the host no such device.
[[nodiscard]] at::Device parse_device(const std::string& name, int local_rank);
/// @throws InvalidArgument
[[nodiscard]] at::ScalarType parse_dtype_name(const std::string& name);

/// Fills hdp = 0 and checks that the layout fits. @throws InvalidArgument
[[nodiscard]] Layout resolve_layout(Layout layout, int world_size, const char* where);

/// The placement that a run's configuration asks for. Its nodes are the section's, else the hosts.
/// @throws InvalidArgument  what does not fit, by name
[[nodiscard]] parallel::ModelPlacement place(const model::ModelConfig& model, const Layout& layout,
                                             const ParallelSection& section, const Hosts& hosts);

/// HDP ranks of a node; 0: all are in one, or nodes do not hold whole tensor-parallel groups.
[[nodiscard]] int hdp_ranks_per_node(const parallel::ModelPlacement& placement);

/// Verifies plan and programs of all ranks together. @throws PlanError
void verify_step(const plan::StepPlan& plan, const plan::CompileOptions& options);

/// How plans become programs for a placed model.
[[nodiscard]] plan::CompileOptions compile_options(const parallel::ModelPlacement& placement,
                                                   const std::string& schedule);

}  // namespace meshloom::train::detail
