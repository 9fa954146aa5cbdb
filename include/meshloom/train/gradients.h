#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"
#include "meshloom/data/source.h"
#include "meshloom/plan/step_plan.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/config.h"

namespace at {
class Tensor;
}

namespace meshloom::train {

struct GradientsOptions {
  std::string model;  ///< Hugging Face folder
  std::string dtype = "float64";
  std::string device = "cpu";
  Layout layout{.hdp = 0};  ///< hdp 0: all ranks
  ParallelSection parallel;
  std::string strategy = "balanced";  ///< by name; the plan carries it
  /// 0: the larger of an equal share of the step and what the longest document needs on the whole
  /// axis.
  std::int64_t capacity_tokens = 0;
  std::optional<plan::StepPlan> plan;  ///< runs this instead of a strategy's
  bool aux_loss = false;  ///< adds the `global` balance loss with the config's coefficient
};

struct GradientsResult {
  double loss = 0.0;  ///< mean over all loss tokens of the step; aux loss included where asked for
  double aux_loss = 0.0;
  std::vector<std::string> names;     ///< of the model folder's own safetensors, in file order
  std::vector<at::Tensor> gradients;  ///< in their shapes; fp64 for float64, else fp32
  plan::StepPlan plan;
};

/// One step's loss and all gradients of `documents` under a layout, to compare with a reference.
/// Document i is sample i of the plan. Collective; every rank gives the same arguments and gets the
/// whole result.
/// @param strategy  makes the plan on rank 0 instead of the one that `options.strategy` names.
/// @throws InvalidArgument  the layout does not fit the world; no document has a loss token.
/// @throws PlanError        the plan breaks a contract, or is not one of these documents.
/// @throws IoError, DataError, NotSupported  the folder, as ModelConfig::load and load_pretrained.
[[nodiscard]] MESHLOOM_API GradientsResult
gradients(const GradientsOptions& options, const std::vector<data::Document>& documents,
          comm::Communicator world, std::shared_ptr<plan::BalanceStrategy> strategy = nullptr);

/// The result as a safetensors file: the folder's names, and a scalar `loss` (fp64). @throws
/// IoError
MESHLOOM_API void save_gradients(const GradientsResult& result, const std::string& path);

}  // namespace meshloom::train
