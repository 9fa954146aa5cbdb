#pragma once

#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// One broken contract, in a sentence that names slot, unit, rank and sample where they apply.
struct Violation {
  std::string contract;  ///< e.g. "conservation", "capacity", "disjoint", "deadlock"
  std::string message;
};

/// Checks every contract of a plan; shares no code with the planners. Empty: the plan is valid.
[[nodiscard]] MESHLOOM_API std::vector<Violation> check_plan(const StepPlan& plan);

/// Checks all ranks' programs of one step together, against the plan they come from: every send
/// meets its receive, rendezvous sets agree, the graph of instructions and rendezvous (unbuffered
/// semantics) is acyclic, each token is trained exactly once, loss weights sum to one.
[[nodiscard]] MESHLOOM_API std::vector<Violation> check_programs(
    const StepPlan& plan, const std::vector<Program>& programs);

/// Checks memory over time: on no rank the activations kept between a forward and what frees them
/// (its backward, or its deferred weight gradient) exceed those of `most_tokens` tokens of all
/// layers; a stage's chunk of a pipeline counts as its part of the layers. 1F1B and ZB-H1 keep at
/// most one unit's, interleaving and tables of one's own may keep more.
[[nodiscard]] MESHLOOM_API std::vector<Violation> check_memory(const StepPlan& plan,
                                                               const std::vector<Program>& programs,
                                                               double most_tokens);

/// @throws PlanError  the first violation's text, and how many more there are.
MESHLOOM_API void verify(const StepPlan& plan);
MESHLOOM_API void verify(const StepPlan& plan, const std::vector<Program>& programs);

}  // namespace meshloom::plan
