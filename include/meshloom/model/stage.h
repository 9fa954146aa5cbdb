#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "meshloom/core/export.h"
#include "meshloom/model/activation_store.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"
#include "meshloom/model/router_balance.h"
#include "meshloom/model/sharded_linear.h"
#include "meshloom/model/token_dispatcher.h"

namespace meshloom::model {

/// What backward computes again instead of keeping it. `kSelective`: the gate and up projections,
/// the largest tensors of a layer, from its norm: no communication but that of tensor parallelism.
/// `kFull`: the whole layer from its input, exchange and dispatch included, so that every rank of a
/// step has to do it. Results are the same bits.
enum class Recompute : std::uint8_t { kNone, kSelective, kFull };

/// "none", "selective", "full". @throws InvalidArgument  another name.
[[nodiscard]] MESHLOOM_API Recompute parse_recompute(const std::string& name);

/// Everything a stage asks of the world while it runs one micro-batch. Not owned.
struct StageContext {
  const SequenceBatch& batch;
  /// The batch's rows that this rank holds of the residual stream, `linear.own_rows` of them: the
  /// batch itself without tensor parallelism. Only `documents` are read.
  const SequenceBatch& stream;
  ParameterSource& parameters;
  AttentionExchange& attention;
  TokenDispatcher& dispatcher;
  ShardedLinear& linear;
  RouterBalance* balance = nullptr;        ///< none: no balance loss
  WeightGradSink* gradients = nullptr;     ///< none: evaluation, nothing is saved
  ActivationStore* activations = nullptr;  ///< set together with `gradients`
  double loss_weight = 1.0;                ///< of one loss token: 1 / loss tokens of the step
  double z_loss_weight = 0.0;  ///< z-loss coefficient / tokens of the step, of one token and layer
  Recompute recompute = Recompute::kNone;
};

/// What a stage's forward gives.
struct StageOutput {
  at::Tensor hidden;        ///< [own rows, hidden] for the next stage; undefined with a head
  double loss_sum = 0.0;    ///< with a head: unweighted sum of token losses of this micro-batch
  double z_loss_sum = 0.0;  ///< unweighted sum over tokens and MoE layers of logsumexp^2
};

/// Layers [first_layer, last_layer) of a decoder, with or without embedding and head. Stateless
/// apart from its shapes: any number of micro-batches may be in flight, each with its own context.
/// Forward and backward are written out layer by layer; what backward needs goes through the
/// activation store, weight gradients through the sink.
class MESHLOOM_API Stage {
 public:
  virtual ~Stage();

  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  /// Parameters of this stage, in its own flat space.
  [[nodiscard]] virtual const ParameterTable& parameters() const = 0;

  /// @param input  [own rows, hidden] from the previous stage; ignored with an embedding.
  virtual StageOutput forward(const StageContext& context, const at::Tensor& input) = 0;

  /// @param dhidden  gradient of `hidden`; ignored with a head (the loss was scaled by
  ///   context.loss_weight).
  /// @returns gradient of `input`; undefined with an embedding.
  virtual at::Tensor backward(const StageContext& context, const at::Tensor& dhidden) = 0;
};

/// @param layers  may be empty, e.g. for a stage of the head alone
/// @param shard   this rank's part of a tensor-parallel stage, see `parameter_table`
/// @throws InvalidArgument  the layer range is outside the model, or the shard's ranks don't divide
///   the heads.
[[nodiscard]] MESHLOOM_API std::unique_ptr<Stage> build_stage(
    const ModelConfig& config, std::pair<std::int64_t, std::int64_t> layers, bool with_embedding,
    bool with_head, TensorShard shard = {});

}  // namespace meshloom::model
