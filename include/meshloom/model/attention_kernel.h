#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "meshloom/core/export.h"
#include "meshloom/model/attention_exchange.h"

namespace meshloom::model {

/// One block of attention: query rows [q_begin, q_begin + q_rows) of the q tensor, which are tokens
/// q_position, q_position + 1, ... of a document, against key rows [k_begin, k_begin + k_rows) at
/// k_position on. A query at position p sees keys at positions p - window + 1 .. p (window 0: from
/// 0). A block in which no query sees a key is legal and contributes nothing.
struct AttentionBlock {
  std::int64_t q_begin = 0;
  std::int64_t q_rows = 0;
  std::int64_t q_position = 0;
  std::int64_t k_begin = 0;
  std::int64_t k_rows = 0;
  std::int64_t k_position = 0;
};

/// Attends over `blocks` and merges the result into (out, lse) by log-sum-exp: the state after the
/// call is attention over all keys seen by this and earlier calls. `accumulator` is the running
/// output, [T, Hq, Dv] in the dtype of lse; rows that have seen no key have lse = -inf and output
/// 0. Blocks of one call with the same query rows are merged in list order, so the result does not
/// depend on the number of threads.
/// @param q  [T, Hq, D] @param k  [S, Hkv, D] @param v  [S, Hkv, Dv]; any row and head stride, the
/// last dimension contiguous.
MESHLOOM_API void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v,
                                     std::span<const AttentionBlock> blocks,
                                     const AttentionOptions& options);

/// Adds the gradients of `blocks` to dq, dk, dv (dtype of lse), given the final log-sum-exp over
/// all blocks and delta = rowsum(dout * out), [Hq, T] in the dtype of lse.
MESHLOOM_API void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv,
                                      const at::Tensor& dout, const at::Tensor& q,
                                      const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& lse, const at::Tensor& delta,
                                      std::span<const AttentionBlock> blocks,
                                      const AttentionOptions& options);

/// rowsum(dout * out): [Hq, T], fp32 (fp64 for fp64 inputs).
[[nodiscard]] MESHLOOM_API at::Tensor attention_delta(const at::Tensor& dout,
                                                      const at::Tensor& out);

}  // namespace meshloom::model
