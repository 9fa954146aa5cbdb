#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/config.h"

namespace meshloom::model {

/// A training document: `loss_mask[t]` says whether token t is a target (empty: all but the first,
/// which nothing predicts).
struct Document {
  std::vector<std::int64_t> tokens;
  std::vector<bool> loss_mask;
};

/// Whole documents end to end, labels shifted, sample ids counting from `first_sample`.
/// @throws InvalidArgument  a loss mask whose length is not its document's.
[[nodiscard]] MESHLOOM_API SequenceBatch make_batch(const std::vector<Document>& documents,
                                                    std::int64_t first_sample = 0);

struct ReferenceOptions {
  double balance_coefficient = 0.0;     ///< 0: no balance loss
  std::string balance_form = "global";  ///< as make_balance_loss names them
  at::Tensor balance_state;             ///< of the step before, where the form has one
  double z_coefficient = 0.0;           ///< mean over tokens, sum over layers
};

struct ReferenceStep {
  double loss = 0.0;  ///< all parts together
  double balance_loss = 0.0;
  double z_loss = 0.0;
  std::int64_t loss_tokens = 0;
  at::Tensor balance_state;  ///< for the next step, where the form has one
  at::Tensor gradients;      ///< flat, laid out as parameter_table of the whole model; fp32 or fp64
};

/// One optimizer step's loss and gradients on a single rank, in one micro-batch: mean cross-entropy
/// over all loss tokens. What every layout is compared with.
/// @param values  flat parameters of the whole model.
/// @throws InvalidArgument  no loss token; a token outside the vocabulary.
[[nodiscard]] MESHLOOM_API ReferenceStep reference_step(const ModelConfig& config,
                                                        const at::Tensor& values,
                                                        const std::vector<Document>& documents,
                                                        const ReferenceOptions& options = {});

}  // namespace meshloom::model
