#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::model {

/// What a saved tensor is, so that a policy can keep, offload or recompute by kind.
enum class Activation : std::uint8_t {
  kLayerInput,
  kNorm,
  kQkv,
  kAttention,
  kLogSumExp,
  kMlp,
  kRouting,
  kHead,
  kOther,
};

/// What one micro-batch's forward on one model chunk leaves for its backward: a stack, since layers
/// run backward in exactly the reverse order. One store per (slot, chunk) in flight.
class MESHLOOM_API ActivationStore {
 public:
  virtual ~ActivationStore();
  virtual void push(Activation kind, at::Tensor tensor) = 0;
  /// Forward has ended this layer of the model: what was pushed since the layer before is the
  /// layer's, and may be away until backward comes to it. What no layer owns is pushed after all.
  virtual void layer_done(std::int64_t layer);
  /// @throws InvalidArgument  the stack is empty or its top is of another kind: forward and
  ///   backward of a layer disagree.
  [[nodiscard]] virtual at::Tensor pop(Activation kind) = 0;
  /// Held in the memory of the device.
  [[nodiscard]] virtual std::int64_t bytes() const = 0;
};

/// Keeps everything where it is.
class MESHLOOM_API ResidentActivations final : public ActivationStore {
 public:
  void push(Activation kind, at::Tensor tensor) override;
  [[nodiscard]] at::Tensor pop(Activation kind) override;
  [[nodiscard]] std::int64_t bytes() const override;

 private:
  struct Entry {
    Activation kind;
    at::Tensor tensor;
  };
  std::vector<Entry> entries_;
};

}  // namespace meshloom::model
