#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"

namespace meshloom::model {

/// A tensor of the checkpoint, by its Hugging Face name.
struct ParameterSpec {
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t offset = 0;  ///< elements from the start of the flat space
  bool decay = true;        ///< weight decay by default (not for norms, biases, embeddings)
  bool ones = false;        ///< initialised to one (norm weights); biases to zero; else normal
  bool zeros = false;
  [[nodiscard]] std::int64_t elements() const;
};

/// Handle of what a layer asks for: `count` neighbouring tensors seen as one, e.g. q, k and v
/// weights as [(Hq + 2 Hkv) * D, hidden], or all experts' gate and up weights as
/// [experts, 2 * intermediate, hidden]. Neighbours in the flat space by construction, so a view.
struct ParameterHandle {
  std::int64_t offset = -1;         ///< -1: the layer has no such parameter
  std::vector<std::int64_t> shape;  ///< of the fused view
  [[nodiscard]] explicit operator bool() const { return offset >= 0; }
};

/// All parameters of a model (or stage), laid out in one flat space of elements, in an order in
/// which tensors that are used together are neighbours. Tied embeddings appear once.
struct MESHLOOM_API ParameterTable {
  std::vector<ParameterSpec> parameters;
  std::int64_t elements = 0;
  /// @throws InvalidArgument  unknown name.
  [[nodiscard]] const ParameterSpec& find(const std::string& name) const;
};

/// Where a layer's weights come from. The default is one resident flat buffer; ZeRO-3, tensor and
/// expert parallelism answer differently.
class MESHLOOM_API ParameterSource {
 public:
  virtual ~ParameterSource();
  /// The weights, valid until `release`. @returns handle.shape, compute dtype.
  virtual at::Tensor acquire(const ParameterHandle& handle) = 0;
  virtual void release(const ParameterHandle& handle) = 0;
};

/// Where weight gradients go: accumulated now, or recorded and computed later (zero-bubble
/// schedules). Tensors passed in are kept until then.
class MESHLOOM_API WeightGradSink {
 public:
  virtual ~WeightGradSink();
  /// grad += dy^T x. @param dy [T, out] @param x [T, in]; handle.shape = [out, in].
  virtual void linear(const ParameterHandle& handle, const at::Tensor& dy, const at::Tensor& x) = 0;
  /// grad[e] += dy[rows of e]^T x[rows of e]; rows sorted by expert. handle.shape = [E, out, in].
  /// @param rows  rows of each expert, [E].
  virtual void grouped_linear(const ParameterHandle& handle, const at::Tensor& dy,
                              const at::Tensor& x, const std::vector<std::int64_t>& rows) = 0;
  /// grad[ids[t]] += dy[t]. handle.shape = [vocab, hidden].
  virtual void embedding(const ParameterHandle& handle, const at::Tensor& ids,
                         const at::Tensor& dy) = 0;
  /// grad += value (norms, biases).
  virtual void add(const ParameterHandle& handle, const at::Tensor& value) = 0;
};

/// One resident flat buffer of parameters and one of gradients: both seams for a single rank (and
/// for data parallelism, where gradients are synchronised after the step's last backward).
class MESHLOOM_API FlatParameters final : public ParameterSource, public WeightGradSink {
 public:
  /// @param values     [table.elements], compute dtype
  /// @param gradients  [table.elements], fp32 (fp64 for fp64), zeroed by the owner; may be
  ///   undefined where nothing is trained.
  FlatParameters(at::Tensor values, at::Tensor gradients);

  at::Tensor acquire(const ParameterHandle& handle) override;
  void release(const ParameterHandle& handle) override;
  void linear(const ParameterHandle& handle, const at::Tensor& dy, const at::Tensor& x) override;
  void grouped_linear(const ParameterHandle& handle, const at::Tensor& dy, const at::Tensor& x,
                      const std::vector<std::int64_t>& rows) override;
  void embedding(const ParameterHandle& handle, const at::Tensor& ids,
                 const at::Tensor& dy) override;
  void add(const ParameterHandle& handle, const at::Tensor& value) override;

  [[nodiscard]] const at::Tensor& values() const { return values_; }
  [[nodiscard]] const at::Tensor& gradients() const { return gradients_; }

 private:
  at::Tensor values_;
  at::Tensor gradients_;
};

/// Initial values keyed by (seed, name, element): the same under any layout. Norm weights one,
/// biases zero, all else normal with the config's initializer_range.
/// @param values [table.elements]; written.
MESHLOOM_API void initialize_(at::Tensor& values, const ParameterTable& table, double range,
                              std::uint64_t seed);

}  // namespace meshloom::model
