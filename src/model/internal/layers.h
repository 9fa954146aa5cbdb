#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "meshloom/model/ops.h"
#include "meshloom/model/stage.h"

namespace meshloom::model::detail {

/// A weight for the time of a scope.
class HeldWeight {
 public:
  HeldWeight(ParameterSource& source, const ParameterHandle& handle)
      : source_(source), handle_(handle) {
    if (handle_) tensor_ = source_.acquire(handle_);
  }
  HeldWeight(const HeldWeight&) = delete;
  HeldWeight& operator=(const HeldWeight&) = delete;
  ~HeldWeight() {
    tensor_.reset();
    if (handle_) source_.release(handle_);
  }
  /// Undefined where the layer has no such parameter.
  [[nodiscard]] const at::Tensor& operator*() const { return tensor_; }

 private:
  ParameterSource& source_;
  const ParameterHandle& handle_;
  at::Tensor tensor_;
};

/// One micro-batch on its way through a stage.
struct Pass {
  const StageContext& context;
  ops::RopeTables tables;
  double z_loss_sum = 0.0;

  [[nodiscard]] bool saves() const { return context.gradients != nullptr; }
  [[nodiscard]] bool recomputes_projections() const {
    return context.recompute == Recompute::kSelective;
  }
  void save(Activation kind, const at::Tensor& tensor) const {
    if (saves()) context.activations->push(kind, tensor);
  }
  [[nodiscard]] at::Tensor restore(Activation kind) const { return context.activations->pop(kind); }
};

/// y = x W^T (+ b) with its gradients; the pieces that every sublayer is made of.
struct LinearHandles {
  ParameterHandle weight;
  ParameterHandle bias;
};

/// Each sublayer maps the normalised stream x to what is added to the residual stream. backward
/// takes the gradient of that, dy (never written to), and x again, and returns dx. Both pop exactly
/// what forward pushed.
class AttentionLayer {
 public:
  AttentionLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer);
  at::Tensor forward(Pass& pass, const at::Tensor& x) const;
  at::Tensor backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const;

 private:
  /// q, k, v from the projection: after the rotation (in place), or normalised and rotated.
  struct Heads {
    at::Tensor q, k, v;
  };
  Heads heads(const Pass& pass, const at::Tensor& qkv) const;

  ops::QkvLayout layout_;
  AttentionOptions options_;
  double eps_;
  LinearHandles qkv_;
  LinearHandles output_;
  ParameterHandle q_norm_;
  ParameterHandle k_norm_;
};

/// The output projection's gradients. @param dy  [own rows, hidden] @param out  of attention
/// @returns the gradient of `out`
at::Tensor output_backward(const StageContext& context, const LinearHandles& output,
                           const at::Tensor& dy, const at::Tensor& out);

/// Multi-head latent attention. Keys and values are made from their latents when they are needed
/// and never saved, nor are queries that have a latent of their own.
class LatentAttentionLayer {
 public:
  LatentAttentionLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer);
  at::Tensor forward(Pass& pass, const at::Tensor& x) const;
  at::Tensor backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const;

 private:
  /// What the latents make, and the norms on the way, for their gradients.
  struct Queries {
    ops::NormOutput normed;  ///< of the latent; undefined without one
    at::Tensor q;            ///< [T, heads, qk], rotated
  };
  /// What keys and values are made from: the normalised latent and the rotated key that all heads
  /// share.
  struct Latents {
    ops::NormOutput normed;  ///< of the stream's rows
    at::Tensor rows;         ///< [T, kv_lora_rank + rope], of all tokens
  };
  class Expansion;
  /// @param x  the stream, for queries without a latent.
  Queries queries(const Pass& pass, const at::Tensor& latents, const at::Tensor& x) const;
  Latents latents_of_keys(const Pass& pass, const at::Tensor& latents) const;
  /// Of `rows`, the part that is rotated, [R, 1, rope].
  at::Tensor shared_part(const at::Tensor& rows) const;
  KeysAndValues expand(const StageContext& context, const at::Tensor& rows) const;
  at::Tensor contract(const StageContext& context, const at::Tensor& rows, const at::Tensor& dk,
                      const at::Tensor& dv) const;
  void rotate(const Pass& pass, at::Tensor part, bool back) const;
  /// Gradients of the projections from the latents, and of the latents. @returns dx, undefined
  /// where queries have a latent.
  at::Tensor queries_backward(const Pass& pass, const at::Tensor& dq, const Queries& queries,
                              const at::Tensor& latents, const at::Tensor& x,
                              const at::Tensor& dlatents) const;
  /// @param drows  [T, kv_lora_rank + rope]; rotated back in place
  void latents_backward(const Pass& pass, const at::Tensor& drows, const ops::NormOutput& normed,
                        const at::Tensor& latents, const at::Tensor& dlatents) const;

  std::int64_t heads_;
  LatentAttentionConfig sizes_;
  AttentionOptions options_;
  LinearHandles down_;  ///< to the latents of queries and of keys, and the shared part of keys
  ParameterHandle q_norm_;
  ParameterHandle kv_norm_;
  LinearHandles queries_;
  LinearHandles keys_;  ///< and values
  LinearHandles output_;
};

class DenseLayer {
 public:
  DenseLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer);
  /// The MLP whose parameters begin with `prefix`. @param inner  its intermediate size.
  DenseLayer(const ParameterTable& table, const std::string& prefix, std::int64_t hidden,
             std::int64_t inner, bool biased);
  at::Tensor forward(Pass& pass, const at::Tensor& x) const;
  at::Tensor backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const;

 private:
  at::Tensor project(const Pass& pass, const at::Tensor& x) const;

  LinearHandles gate_up_;
  LinearHandles down_;
};

/// Routed experts, and the shared one, an MLP that every token meets. The shared one computes while
/// tokens are on their way to the routed ones.
class MoeLayer {
 public:
  MoeLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer);
  at::Tensor forward(Pass& pass, const at::Tensor& x) const;
  at::Tensor backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const;

 private:
  at::Tensor project(const Pass& pass, const DispatchedTokens& tokens) const;

  std::int64_t layer_;
  std::int64_t experts_;
  ops::RouterOptions router_options_;
  ParameterHandle router_;
  ParameterHandle correction_;
  ParameterHandle gate_up_;
  ParameterHandle down_;
  std::optional<DenseLayer> shared_;
};

/// Inverse frequencies of the rotary embedding, [rope_dim / 2], computed in `dtype` as transformers
/// computes them, and the factor on cos and sin.
struct RopeFrequencies {
  at::Tensor inverse;
  double scaling = 1.0;
};
RopeFrequencies rope_frequencies(const ModelConfig& config, at::ScalarType dtype);

/// What scores are multiplied by: 1 / sqrt(head_dim), and with latent attention yarn's
/// mscale_all_dim.
double attention_scale(const ModelConfig& config);

}  // namespace meshloom::model::detail
