#pragma once

// One optimizer step of small models under a layout, and the comparison with one rank that computes
// every document whole, in one micro-batch, without a plan (model::reference_step).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/config.h"
#include "meshloom/model/reference.h"
#include "meshloom/model/stage.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/plan/schedule.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::parallel::sweep {

// DESIGN.md, Precision: distributed equals single-process within 1e-10 of each tensor's largest
// element in fp64, for loss and every gradient.
inline constexpr double kParity = 1e-10;
inline constexpr double kSingleParity = 1e-5;  // the same in fp32

inline constexpr std::int64_t kCapacity = 24;

extern const char* const kMoe;      ///< Qwen3-MoE, a dense layer among two
extern const char* const kMixtral;  ///< with a sliding window
extern const char* const kDense;    ///< Llama, tied, three heads on one key-value head

/// Length 1, primes, shorter than the rank count, and one that fills all ranks; some with loss
/// masks, one of them without a single target.
[[nodiscard]] std::vector<model::Document> documents(int ranks, std::int64_t vocabulary);

[[nodiscard]] SampleLoader loader_of(const std::vector<model::Document>& documents);

[[nodiscard]] plan::PlanProblem problem_of(const std::vector<model::Document>& documents, int ranks,
                                           int ep = 1);
[[nodiscard]] plan::PlanProblem problem_of(const std::vector<model::Document>& documents,
                                           const Layout& layout);

struct Setting {
  const char* config = kMoe;
  std::string balance = "none";  ///< form of the balance loss
  double z_loss = 0.0;
  at::ScalarType dtype = at::kDouble;  ///< or fp32, compared with one rank in fp32
  Zero zero = Zero::kOptimizer;
  std::string schedule{};    ///< of the pipeline, by name
  std::vector<int> split{};  ///< layers of its pieces
  model::Recompute recompute = model::Recompute::kNone;
  int ranks_per_node = 0;
  std::shared_ptr<const plan::Schedule> table = nullptr;  ///< instead of a schedule by name
};

struct Expected {
  model::ReferenceStep step;
  at::Tensor former_state;  ///< of the balance loss, from a step before
};

[[nodiscard]] Expected solve_alone(const Setting& setting,
                                   const std::vector<model::Document>& documents);

/// Runs the plan's programs on this rank of `world` and compares loss and gradients with what one
/// rank has. Collective. @returns differences in words, empty if there are none.
[[nodiscard]] std::string run_and_compare(const Setting& setting, const plan::StepPlan& plan,
                                          const std::vector<model::Document>& documents,
                                          const Expected& expected, comm::Communicator world);

}  // namespace meshloom::parallel::sweep
