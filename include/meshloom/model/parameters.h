#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/model/config.h"

namespace meshloom::model {

/// One rank's place in a tensor-parallel group.
struct TensorShard {
  int rank = 0;
  int ranks = 1;
};

/// A tensor of the checkpoint, by its Hugging Face name, or the box of it that is held here.
struct MESHLOOM_API ParameterSpec {
  std::string name;
  std::vector<std::int64_t> shape;     ///< of what is held here
  std::vector<std::int64_t> whole{};   ///< of the checkpoint's tensor; empty: all of it is here
  std::vector<std::int64_t> corner{};  ///< where the box begins in it; empty with `whole`
  std::int64_t offset = 0;             ///< elements from the start of the flat space
  bool decay = true;  ///< weight decay by default (not for norms, biases, embeddings)
  bool ones = false;  ///< initialised to one (norm weights); biases to zero; else normal
  bool zeros = false;
  std::int64_t expert = -1;  ///< which routed expert it belongs to; -1: none
  std::int64_t layer = -1;   ///< decoder layer; -1: embedding; config.layers: final norm and head
  int copies = 1;            ///< neighbours in the tensor-parallel group that hold the same box
  /// A router's correction bias: no gradient flows into it. What backward adds to its gradient is
  /// how often each expert was chosen, and whoever optimises balances the experts by that.
  bool counts_choices = false;
  [[nodiscard]] std::int64_t elements() const;
  /// Shape of the checkpoint's tensor.
  [[nodiscard]] const std::vector<std::int64_t>& whole_shape() const {
    return whole.empty() ? shape : whole;
  }
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
  std::vector<ParameterSpec> parameters;  ///< by offset, without gaps
  std::int64_t elements = 0;
  /// @throws InvalidArgument  unknown name.
  [[nodiscard]] const ParameterSpec& find(const std::string& name) const;
  /// The parameter, or null.
  [[nodiscard]] const ParameterSpec* find_if(const std::string& name) const;
  /// Appends a parameter at the end of the flat space and returns its offset.
  std::int64_t append(ParameterSpec spec);

 private:
  std::unordered_map<std::string, std::size_t> index_;
};

/// The parameters of layers [first, last) with the embedding, the head and the final norm where
/// asked. In flat order: embedding; per layer input norm, q k v weights, q k v biases, q and k
/// norms, output projection (latent attention: the projections to the latents, their biases and
/// norms, the projections from them, output projection), post-attention norm, then gate, up, down,
/// or the router, its correction bias, the shared expert, all experts' (gate, up) and all experts'
/// down; final norm; head. Names are the Hub checkpoints':
/// experts one by one. With tied embeddings the head is the embedding's tensor.
/// With a tensor shard: q, k, v by whole heads, gate and up by features, output and down
/// projections by input features, embedding and head by vocabulary; all other parameters are whole
/// on every rank, experts too. With fewer K/V heads than ranks, neighbours hold the same one.
/// @throws InvalidArgument  the layer range is outside the model, or the shard's ranks don't divide
///   the heads: says which ranks do.
[[nodiscard]] MESHLOOM_API ParameterTable
parameter_table(const ModelConfig& config, std::pair<std::int64_t, std::int64_t> layers,
                bool with_embedding, bool with_head, TensorShard shard = {});

/// The sizes that one rank of a tensor-parallel group computes with: its heads, its features of
/// dense layers, its part of the vocabulary.
/// @throws InvalidArgument  as `parameter_table`.
[[nodiscard]] MESHLOOM_API ModelConfig shard_config(const ModelConfig& config, TensorShard shard);

/// The part of `size` that one rank holds: [floor(size r / n), floor(size (r + 1) / n)).
[[nodiscard]] MESHLOOM_API std::pair<std::int64_t, std::int64_t> shard_range(std::int64_t size,
                                                                             TensorShard shard);

/// Handle of parameter `first` and the neighbours after it that `shape` takes in.
/// @throws InvalidArgument  unknown name, or the elements from it on do not make up `shape`.
[[nodiscard]] MESHLOOM_API ParameterHandle parameter_handle(const ParameterTable& table,
                                                            const std::string& first,
                                                            std::vector<std::int64_t> shape);

/// Where a layer's weights come from. The default is one resident flat buffer; ZeRO-3, tensor and
/// expert parallelism answer differently.
class MESHLOOM_API ParameterSource {
 public:
  virtual ~ParameterSource();
  /// The weights, valid until `release`. @returns handle.shape, compute dtype; of routed experts
  /// (handle.shape[0] of them) only those that this rank holds, in their order.
  virtual at::Tensor acquire(const ParameterHandle& handle) = 0;
  virtual void release(const ParameterHandle& handle) = 0;
};

/// Where weight gradients go: accumulated now, or recorded and computed later (zero-bubble
/// schedules).
class MESHLOOM_API WeightGradSink {
 public:
  virtual ~WeightGradSink();
  /// Whether tensors passed in are kept after the call: the model then never writes to them again.
  [[nodiscard]] virtual bool deferred() const { return false; }
  /// grad += dy^T x. @param dy [T, out] @param x [T, in]; handle.shape = [out, in].
  virtual void linear(const ParameterHandle& handle, const at::Tensor& dy, const at::Tensor& x) = 0;
  /// grad[e] += dy[rows of e]^T x[rows of e]; rows sorted by expert. handle.shape = [E, out, in].
  /// @param rows  rows of each expert that this rank holds, [E] where it holds all.
  virtual void grouped_linear(const ParameterHandle& handle, const at::Tensor& dy,
                              const at::Tensor& x, const std::vector<std::int64_t>& rows) = 0;
  /// grad[ids[t]] += dy[t]. handle.shape = [vocab, hidden].
  virtual void embedding(const ParameterHandle& handle, const at::Tensor& ids,
                         const at::Tensor& dy) = 0;
  /// grad += value (norms, biases).
  virtual void add(const ParameterHandle& handle, const at::Tensor& value) = 0;
  /// All gradients of this micro-batch to parameters of `layer` (ParameterSpec::layer) were given.
  virtual void layer_done(std::int64_t /*layer*/) {}
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
