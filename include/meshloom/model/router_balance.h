#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "meshloom/core/export.h"
#include "meshloom/model/batch.h"

namespace meshloom::model {

/// The balance loss of mixture-of-experts layers, as a seam: the router reports what it chose and
/// asks for the gradient with respect to its mean probabilities, because the loss is a product of
/// counts and mean probabilities whose denominators may span documents, units or the whole step.
class MESHLOOM_API RouterBalance {
 public:
  virtual ~RouterBalance();

  /// Called by every MoE layer in forward.
  /// @param probabilities  [T, E], compute dtype or fp32 @param experts  int64 [T, k]
  /// @returns d(loss)/d(probabilities) as a vector per document slice or one for all:
  ///   [documents or 1, E], already divided by its token denominators; undefined for none.
  virtual at::Tensor observe(int layer, const at::Tensor& probabilities, const at::Tensor& experts,
                             const SequenceBatch& batch) = 0;
};

}  // namespace meshloom::model
