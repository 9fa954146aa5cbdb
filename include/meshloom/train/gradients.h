#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/data/source.h"
#include "meshloom/plan/step_plan.h"

namespace at {
class Tensor;
}

namespace meshloom::train {

struct GradientsOptions {
  std::string model;  ///< Hugging Face folder
  std::string dtype = "float64";
  Layout layout;
  std::string strategy = "balanced";
  std::int64_t capacity_tokens = 0;    ///< 0: what the longest document needs on the whole axis
  std::optional<plan::StepPlan> plan;  ///< runs this instead of a strategy's
  bool aux_loss = false;  ///< adds the `global` balance loss with the config's coefficient
};

struct GradientsResult {
  double loss = 0.0;               ///< aux loss included where asked for
  std::vector<std::string> names;  ///< of the model folder's tensors
  std::vector<at::Tensor> gradients;
  plan::StepPlan plan;
};

/// One step's loss and all gradients of `documents` under a layout. Collective; every rank gets the
/// whole result.
[[nodiscard]] MESHLOOM_API GradientsResult gradients(const GradientsOptions& options,
                                                     const std::vector<data::Document>& documents,
                                                     comm::Communicator world);

}  // namespace meshloom::train
