#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include "meshloom/model/attention_kernel.h"
#include "model/kernels/attention_driver.h"
#include "model/kernels/checks.h"
#include "model/kernels/composite.h"
#include "model/kernels/cpu_level.h"
#include "model/kernels/dispatch.h"

namespace meshloom::model {
namespace {

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& lse, std::span<const AttentionBlock> blocks,
                  const AttentionOptions& options, const char* where) {
  kernels::check_shape(q, {-1, -1, -1}, where, "q");
  kernels::check_shape(k, {-1, -1, q.size(2)}, where, "k");
  kernels::check_shape(v, {k.size(0), k.size(1), -1}, where, "v");
  MESHLOOM_CHECK_GT(k.size(1), 0, where, "kv heads");
  MESHLOOM_CHECK_EQ(q.size(1) % k.size(1), 0, where, "q heads modulo kv heads");
  kernels::check_shape(lse, {q.size(1), q.size(0)}, where, "lse");
  kernels::check_type(lse, ops::composite::stat_type(q), where, "lse");
  MESHLOOM_CHECK_GE(options.window, 0, where, "window");
  for (const AttentionBlock& block : blocks) {
    MESHLOOM_CHECK(
        block.q_begin >= 0 && block.q_rows >= 0 && block.q_begin + block.q_rows <= q.size(0), where,
        "a block's query rows lie outside q");
    MESHLOOM_CHECK(
        block.k_begin >= 0 && block.k_rows >= 0 && block.k_begin + block.k_rows <= k.size(0), where,
        "a block's key rows lie outside k");
  }
}

/// Whether the vector kernels serve a call whose results are `outputs` (bf16 inputs are widened).
bool vectorised(const at::Tensor& lse, const AttentionOptions& options,
                std::initializer_list<at::Tensor> outputs) {
  if (!kernels::served(lse) || lse.stride(1) != 1 || !(options.scale > 0.0)) return false;
  for (const at::Tensor& out : outputs) {
    if (out.size(2) > 1 && out.stride(2) != 1) return false;
  }
  return true;
}

}  // namespace

void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v,
                        std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  constexpr const char* kWhere = "model.attention_forward_";
  check_inputs(q, k, v, lse, blocks, options, kWhere);
  kernels::check_shape(accumulator, {q.size(0), q.size(1), v.size(2)}, kWhere, "accumulator");
  kernels::check_type(accumulator, lse.scalar_type(), kWhere, "accumulator");
  if (vectorised(lse, options, {accumulator})) {
    kernels::attention_forward_(accumulator, lse, q, k, v, blocks, options);
    return;
  }
  ops::composite::attention_forward_(accumulator, lse, q, k, v, blocks, options);
}

void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& lse, const at::Tensor& delta,
                         std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  constexpr const char* kWhere = "model.attention_backward_";
  check_inputs(q, k, v, lse, blocks, options, kWhere);
  kernels::check_shape(dout, {q.size(0), q.size(1), v.size(2)}, kWhere, "dout");
  kernels::check_shape(dq, {q.size(0), q.size(1), q.size(2)}, kWhere, "dq");
  kernels::check_shape(dk, {k.size(0), k.size(1), k.size(2)}, kWhere, "dk");
  kernels::check_shape(dv, {v.size(0), v.size(1), v.size(2)}, kWhere, "dv");
  kernels::check_shape(delta, {q.size(1), q.size(0)}, kWhere, "delta");
  for (const at::Tensor& gradient : {dq, dk, dv, delta}) {
    kernels::check_type(gradient, lse.scalar_type(), kWhere, "a gradient or delta");
  }
  if (vectorised(lse, options, {dq, dk, dv}) && delta.stride(1) == 1) {
    kernels::attention_backward_(dq, dk, dv, dout, q, k, v, lse, delta, blocks, options);
    return;
  }
  ops::composite::attention_backward_(dq, dk, dv, dout, q, k, v, lse, delta, blocks, options);
}

at::Tensor attention_delta(const at::Tensor& dout, const at::Tensor& out) {
  kernels::check_shape(out, {-1, -1, -1}, "model.attention_delta", "out");
  kernels::check_shape(dout, {out.size(0), out.size(1), out.size(2)}, "model.attention_delta",
                       "dout");
  if (kernels::served(out, dout) && out.stride(2) == 1 && dout.stride(2) == 1) {
    at::Tensor delta = at::empty({out.size(1), out.size(0)}, out.options());
    kernels::with_type(out.scalar_type(), [&](auto number) {
      using T = decltype(number);
      const std::int64_t width = out.size(1) * out.size(2);
      kernels::for_rows(out.size(0), kernels::row_grain(width),
                        [&](std::int64_t begin, std::int64_t end) {
                          kernels::DeltaTask<T> task{};
                          task.dout = dout.const_data_ptr<T>() + begin * dout.stride(0);
                          task.out = out.const_data_ptr<T>() + begin * out.stride(0);
                          task.delta = delta.mutable_data_ptr<T>() + begin;
                          task.dout_row = dout.stride(0);
                          task.dout_head = dout.stride(1);
                          task.out_row = out.stride(0);
                          task.out_head = out.stride(1);
                          task.delta_head = delta.stride(0);
                          task.tokens = end - begin;
                          task.heads = out.size(1);
                          task.head_dim = out.size(2);
                          kernels::table<T>().attention_delta(task);
                        });
    });
    return delta;
  }
  const at::ScalarType stat = ops::composite::stat_type(out);
  return (dout.to(stat) * out.to(stat)).sum({2}).t().contiguous();
}

}  // namespace meshloom::model
