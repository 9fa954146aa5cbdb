#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "meshloom/model/ops.h"

namespace meshloom::model::testing {

// Largest difference over the largest element of the expected tensor. The kernels and the oracle
// sum in different orders: a few hundred roundings of unit size.
inline constexpr double kTolerance64 = 2e-13;
inline constexpr double kTolerance32 = 2e-5;

// Inputs have unit size: what should vanish, as the gradient of a softmax over one key, is measured
// against this.
inline constexpr double kSmallest = 1.0;

inline double tolerance(at::ScalarType type) {
  return type == at::kDouble ? kTolerance64 : kTolerance32;
}

inline ::testing::AssertionResult close(const at::Tensor& given, const at::Tensor& expected,
                                        double limit) {
  if (!given.defined() || !expected.defined() || given.sizes() != expected.sizes()) {
    return ::testing::AssertionFailure() << "shapes differ";
  }
  if (expected.numel() == 0) return ::testing::AssertionSuccess();
  const at::Tensor a = given.detach().to(at::kDouble);
  const at::Tensor b = expected.detach().to(at::kDouble);
  const double scale = std::max(b.abs().max().item<double>(), kSmallest);
  const double error = (a - b).abs().max().item<double>() / scale;
  if (error <= limit) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "relative difference " << error << " over " << limit;
}

/// Runs a body at every level of this machine, and leaves the best one.
template <class Body>
void at_every_level(const Body& body) {
  for (const std::string& level : ops::cpu_levels()) {
    SCOPED_TRACE("level " + level);
    ops::set_cpu_level(level);
    body();
  }
  ops::set_cpu_level("");
}

/// Both types with kernels of their own.
inline const std::vector<at::ScalarType>& kernel_types() {
  static const std::vector<at::ScalarType> types = {at::kDouble, at::kFloat};
  return types;
}

inline at::Tensor leaf(const at::Tensor& x) {
  return x.detach().to(at::kDouble).clone().set_requires_grad(true);
}

}  // namespace meshloom::model::testing
