#pragma once

#include <ATen/core/Tensor.h>

namespace meshloom::comm::conformance {

/// A device of our own for tests where no accelerator is (LibTorch's PrivateUse1): its memory is
/// reached by copies alone, since it holds every byte inverted, and whoever reads it as host memory
/// gets other numbers. It makes, views and copies tensors, no more.
[[nodiscard]] at::Device second_device();

}  // namespace meshloom::comm::conformance
