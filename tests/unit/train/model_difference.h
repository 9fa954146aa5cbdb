#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "meshloom/model/safetensors.h"

namespace meshloom::train {

/// Of any element of two saved models. @param a, b  their folders
inline double largest_difference(const std::string& a, const std::string& b) {
  const model::SafetensorsFile left(a + "/model.safetensors");
  const model::SafetensorsFile right(b + "/model.safetensors");
  EXPECT_EQ(left.tensors().size(), right.tensors().size());
  double worst = 0.0;
  for (const auto& info : left.tensors()) {
    worst = std::max(
        worst, left.tensor(info.name).sub(right.tensor(info.name)).abs().max().item<double>());
  }
  return worst;
}

}  // namespace meshloom::train
