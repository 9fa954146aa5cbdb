#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/mesh/layout.h"
#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/expert_parallel.h"
#include "meshloom/parallel/replicas.h"
#include "meshloom/plan/schedule.h"

namespace meshloom::model {
class Stage;
}

namespace meshloom::parallel {

/// What the optimizer-state parallelism of ZeRO shards over a group of replicas
/// [Rajbhandari et al. 2019]: 1 optimizer states, 2 gradients too, 3 parameters too.
enum class Zero : std::uint8_t { kOptimizer = 1, kGradients = 2, kParameters = 3 };

/// @throws InvalidArgument  not 1, 2 or 3.
[[nodiscard]] MESHLOOM_API Zero parse_zero(int level);

/// Sets of ranks that hold the same values, by what kind of parameter it is. In this order a rank
/// makes its collective calls.
enum class ReplicaSet : std::uint8_t {
  kDense,       ///< the HDP axis: what tp splits; all but tied ones for tp = ep = 1
  kReplicated,  ///< HDP axis x tp: whole on every tensor-parallel rank (norms, routers, ...)
  kKeyValue,    ///< HDP axis x the tensor-parallel neighbours that share a K/V head
  kExpert,      ///< holders of the same experts x tp
  kTied,        ///< HDP axes of the first and last stage: embeddings that are the head, too
};

inline constexpr std::array kReplicaSets{ReplicaSet::kDense, ReplicaSet::kReplicated,
                                         ReplicaSet::kKeyValue, ReplicaSet::kExpert,
                                         ReplicaSet::kTied};

[[nodiscard]] MESHLOOM_API std::string_view to_string(ReplicaSet set);

/// One model chunk of a rank.
struct ChunkPlace {
  int piece = 0;                                   ///< position among all pieces of the model
  std::pair<std::int64_t, std::int64_t> layers{};  ///< [first, last)
  bool with_embedding = false;
  bool with_head = false;
};

/// Parameters of one rank that are summed over one set of ranks and sharded over it: a bucket.
struct MESHLOOM_API PlacedPart {
  ReplicaSet set = ReplicaSet::kDense;
  Zero zero = Zero::kOptimizer;
  int piece = 0;                 ///< of the chunk it belongs to
  std::int64_t first_layer = 0;  ///< lowest ParameterSpec::layer of its parameters
  std::int64_t last_layer = 0;
  model::ParameterTable table;  ///< as this rank holds them, with offsets of its own
  ReplicaOrder replicas;        ///< the ranks that share it
};

/// Which rank holds which part of a model: data, a pure function of its inputs, the same on every
/// rank, from which states, checkpoints and memory predictions are made.
struct MESHLOOM_API ModelPlacement {
  model::ModelConfig config;
  Layout layout;
  std::vector<plan::StageChunk> pieces;  ///< [pp * chunks]: where each piece of the model sits
  std::vector<int> split;                ///< decoder layers of each piece
  std::vector<ExpertMap> experts;        ///< of each decoder layer, the same numbers on members
  Zero zero = Zero::kOptimizer;
  /// Consecutive world ranks of a node, so that sums and gatherings of replicas that fill nodes
  /// evenly go in two levels; 0: in one. Counts where nodes hold whole expert groups and a stage
  /// whole nodes.
  int ranks_per_node = 0;
  /// Parameters of neighbouring layers share a part up to this size, except under
  /// Zero::kParameters, where a part is what is gathered at once: a layer.
  std::int64_t bucket_elements = 8 << 20;

  /// Model chunks of a pipeline stage, by chunk index.
  [[nodiscard]] std::vector<ChunkPlace> chunks(int stage) const;
  /// Parameters of one chunk on a rank, with the handles that its stage asks by. Routed experts are
  /// in the order of their places: those of one rank are neighbours.
  [[nodiscard]] model::ParameterTable chunk_table(const ChunkPlace& chunk, int rank) const;
  /// Who shares parameters of a kind with a rank; nobody where it has none.
  [[nodiscard]] ReplicaOrder replicas(ReplicaSet set, int rank) const;
  /// What a rank holds, in the order in which backward completes it; tied embeddings last. Every
  /// element of the model is in the parts of exactly one set of ranks. Tied embeddings and, with
  /// Zero::kParameters, parameters that are whole under tensor parallelism keep to
  /// Zero::kOptimizer.
  [[nodiscard]] std::vector<PlacedPart> parts(int rank) const;
};

/// The placement of `config` on `layout` under a pipeline schedule.
/// @param schedule  by name, as in plan::make_schedule
/// @param split     layers of each piece; empty: even, floor(v L / n) to floor((v + 1) L / n)
/// @throws InvalidArgument  tp does not serve the heads, more pieces than layers, a split that does
///   not add up: says what would fit.
[[nodiscard]] MESHLOOM_API ModelPlacement place_model(const model::ModelConfig& config,
                                                      const Layout& layout,
                                                      const std::string& schedule = {},
                                                      std::vector<int> split = {},
                                                      Zero zero = Zero::kOptimizer);

/// Layers of each of `pieces` pieces so that a token costs the slowest of them least: by products
/// with the parameters that it meets, the head's among them. Attention over the context, which most
/// layers have alike, is not counted.
/// @throws InvalidArgument  fewer layers than pieces.
[[nodiscard]] MESHLOOM_API std::vector<int> split_by_cost(const model::ModelConfig& config,
                                                          int pieces);

/// The model chunks that a rank runs, by chunk.
[[nodiscard]] MESHLOOM_API std::vector<std::shared_ptr<model::Stage>> build_stages(
    const ModelPlacement& placement, const Coordinates& at);

}  // namespace meshloom::parallel
