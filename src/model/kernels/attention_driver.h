#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "meshloom/model/attention_kernel.h"

/// The vector kernels' attention: CPU, fp32 and fp64 (bf16 is widened). Arguments were checked.
namespace meshloom::model::kernels {

void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v,
                        std::span<const AttentionBlock> blocks, const AttentionOptions& options);
void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& lse, const at::Tensor& delta,
                         std::span<const AttentionBlock> blocks, const AttentionOptions& options);

}  // namespace meshloom::model::kernels
