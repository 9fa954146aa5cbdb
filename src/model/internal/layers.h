#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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

class DenseLayer {
 public:
  DenseLayer(const ModelConfig& config, const ParameterTable& table, std::int64_t layer);
  at::Tensor forward(Pass& pass, const at::Tensor& x) const;
  at::Tensor backward(Pass& pass, const at::Tensor& dy, const at::Tensor& x) const;

 private:
  at::Tensor project(const Pass& pass, const at::Tensor& x) const;

  LinearHandles gate_up_;
  LinearHandles down_;
};

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
  ParameterHandle gate_up_;
  ParameterHandle down_;
};

/// Inverse frequencies of the rotary embedding, [head_dim / 2], computed in `dtype` as transformers
/// computes them, and the factor on cos and sin.
struct RopeFrequencies {
  at::Tensor inverse;
  double scaling = 1.0;
};
RopeFrequencies rope_frequencies(const ModelConfig& config, at::ScalarType dtype);

}  // namespace meshloom::model::detail
