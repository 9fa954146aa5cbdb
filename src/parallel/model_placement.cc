#include "meshloom/parallel/model_placement.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "meshloom/core/check.h"
#include "meshloom/model/stage.h"

namespace meshloom::parallel {
namespace {

constexpr const char* kPlaceWhere = "parallel.place_model";
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr std::array<std::string_view, 5> kSetNames{"dense", "replicated", "key_value", "expert",
                                                    "tied"};

/// World ranks of HDP ranks begin, begin + step, ... of some stages and tensor-parallel ranks.
std::vector<int> world_ranks(const Layout& layout, std::vector<int> stages, int hdp_begin,
                             int hdp_step, int tp_begin, int tp_count) {
  std::vector<int> result;
  std::sort(stages.begin(), stages.end());
  stages.erase(std::unique(stages.begin(), stages.end()), stages.end());
  for (const int pp : stages) {
    for (int hdp = hdp_begin; hdp < layout.hdp; hdp += hdp_step) {
      for (int tp = tp_begin; tp < tp_begin + tp_count; ++tp) {
        result.push_back(layout.rank({.tp = tp, .hdp = hdp, .pp = pp}));
      }
    }
  }
  return result;
}

/// A table that has expert e of every layer where its e-th place is, with the expert of that place
/// there instead. All experts are alike, so offsets stay.
model::ParameterTable by_place(const model::ParameterTable& table,
                               const std::vector<ExpertMap>& experts) {
  using Key = std::pair<std::int64_t, std::int64_t>;  // layer, expert
  std::map<Key, std::vector<const model::ParameterSpec*>> tensors;
  for (const model::ParameterSpec& spec : table.parameters) {
    if (spec.expert >= 0) tensors[{spec.layer, spec.expert}].push_back(&spec);
  }
  std::map<Key, std::size_t> taken;
  model::ParameterTable result;
  for (const model::ParameterSpec& spec : table.parameters) {
    const model::ParameterSpec* held = &spec;
    if (spec.expert >= 0) {
      const Key key{spec.layer, experts[static_cast<std::size_t>(spec.layer)]
                                    .by_place()[static_cast<std::size_t>(spec.expert)]};
      held = tensors.at(key)[taken[key]++];
    }
    result.append(*held);
  }
  return result;
}

}  // namespace

Zero parse_zero(int level) {
  MESHLOOM_CHECK(1 <= level && level <= 3, "parallel.zero",
                 fmt::format("zero is {}, expected 1, 2 or 3", level));
  return static_cast<Zero>(level);
}

std::string_view to_string(ReplicaSet set) { return kSetNames.at(static_cast<std::size_t>(set)); }

std::vector<ChunkPlace> ModelPlacement::chunks(int stage) const {
  std::vector<ChunkPlace> result(static_cast<std::size_t>(layout.chunks));
  std::int64_t first = 0;
  for (std::size_t v = 0; v < pieces.size(); ++v) {
    const std::int64_t last = first + split[v];
    if (pieces[v].stage == stage) {
      result.at(static_cast<std::size_t>(pieces[v].chunk)) = {.piece = static_cast<int>(v),
                                                              .layers = {first, last},
                                                              .with_embedding = v == 0,
                                                              .with_head = v + 1 == pieces.size()};
    }
    first = last;
  }
  return result;
}

model::ParameterTable ModelPlacement::chunk_table(const ChunkPlace& chunk, int rank) const {
  return by_place(
      model::parameter_table(config, chunk.layers, chunk.with_embedding, chunk.with_head,
                             {.rank = layout.coordinates(rank).tp, .ranks = layout.tp}),
      experts);
}

ReplicaOrder ModelPlacement::replicas(ReplicaSet set, int rank) const {
  const Coordinates at = layout.coordinates(rank);
  const int stage_ranks = layout.hdp * layout.tp;
  const bool fits = ranks_per_node > 0 && stage_ranks % ranks_per_node == 0 &&
                    ranks_per_node % (layout.ep * layout.tp) == 0;
  const auto ordered = [&](std::vector<int> stages, int hdp_begin, int hdp_step, int tp_begin,
                           int tp_count) {
    return order_replicas(
        world_ranks(layout, std::move(stages), hdp_begin, hdp_step, tp_begin, tp_count),
        fits ? ranks_per_node : 0);
  };
  switch (set) {
    case ReplicaSet::kDense:
      return ordered({at.pp}, 0, 1, at.tp, 1);
    case ReplicaSet::kReplicated:
      if (layout.tp == 1) return {};
      return ordered({at.pp}, 0, 1, 0, layout.tp);
    case ReplicaSet::kKeyValue: {
      if (config.kv_heads >= layout.tp) return {};
      const int copies = layout.tp / static_cast<int>(config.kv_heads);
      return ordered({at.pp}, 0, 1, at.tp / copies * copies, copies);
    }
    case ReplicaSet::kExpert:
      if (layout.ep * layout.tp == 1) return {};
      return ordered({at.pp}, at.hdp % layout.ep, layout.ep, 0, layout.tp);
    case ReplicaSet::kTied:
      break;
  }
  const int first = pieces.front().stage;
  const int last = pieces.back().stage;
  if (!config.tie_word_embeddings || pieces.size() == 1 || (at.pp != first && at.pp != last)) {
    return {};
  }
  return ordered({first, last}, 0, 1, at.tp, 1);
}

std::vector<PlacedPart> ModelPlacement::parts(int rank) const {
  const Coordinates at = layout.coordinates(rank);
  const int member = at.hdp % layout.ep;
  const auto set_of = [&](const model::ParameterSpec& spec) {
    if (spec.expert >= 0 && layout.ep * layout.tp > 1) return ReplicaSet::kExpert;
    if (config.tie_word_embeddings && pieces.size() > 1 && spec.name == kEmbedding) {
      return ReplicaSet::kTied;
    }
    if (spec.copies == 1) return ReplicaSet::kDense;
    return spec.copies == layout.tp ? ReplicaSet::kReplicated : ReplicaSet::kKeyValue;
  };
  const auto zero_of = [&](ReplicaSet set) {
    const bool small = set == ReplicaSet::kReplicated || set == ReplicaSet::kKeyValue;
    const bool keeps =
        set == ReplicaSet::kTied || (small && zero == Zero::kParameters && layout.tp > 1);
    return keeps ? Zero::kOptimizer : zero;
  };

  std::vector<PlacedPart> result;
  std::set<std::string> tied;
  std::vector<ChunkPlace> own = chunks(at.pp);
  std::sort(own.begin(), own.end(),
            [](const ChunkPlace& a, const ChunkPlace& b) { return a.piece > b.piece; });
  for (const ChunkPlace& chunk : own) {
    const model::ParameterTable table = chunk_table(chunk, rank);
    // Backward meets the last layer first.
    std::vector<const model::ParameterSpec*> specs;
    for (const model::ParameterSpec& spec : table.parameters) {
      if (spec.expert < 0 ||
          experts[static_cast<std::size_t>(spec.layer)].owner(spec.expert) == member) {
        specs.push_back(&spec);
      }
    }
    std::stable_sort(specs.begin(), specs.end(),
                     [](const auto* a, const auto* b) { return a->layer > b->layer; });
    std::map<ReplicaSet, std::size_t> open;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      const model::ParameterSpec& spec = *specs[i];
      const ReplicaSet set = set_of(spec);
      if (set == ReplicaSet::kTied && !tied.insert(spec.name).second) continue;
      auto found = open.find(set);
      if (found != open.end() && result[found->second].first_layer != spec.layer) {
        const PlacedPart& last = result[found->second];
        if (last.zero == Zero::kParameters || last.table.elements >= bucket_elements) {
          open.erase(found);
          found = open.end();
        }
      }
      if (found == open.end()) {
        found = open.emplace(set, result.size()).first;
        PlacedPart part;
        part.set = set;
        part.zero = zero_of(set);
        part.piece = chunk.piece;
        part.last_layer = spec.layer;
        part.replicas = replicas(set, rank);
        result.push_back(std::move(part));
      }
      PlacedPart& part = result[found->second];
      part.first_layer = spec.layer;
      part.table.append(spec);
    }
  }
  std::stable_sort(result.begin(), result.end(), [](const PlacedPart& a, const PlacedPart& b) {
    const auto key = [](const PlacedPart& part) {
      return std::tuple(part.set == ReplicaSet::kTied, -part.piece, -part.first_layer, part.set);
    };
    return key(a) < key(b);
  });
  return result;
}

ModelPlacement place_model(const model::ModelConfig& config, const Layout& layout,
                           const std::string& schedule, std::vector<int> split, Zero zero) {
  layout.validate();
  ModelPlacement result;
  result.config = config;
  result.layout = layout;
  result.pieces = plan::make_schedule(schedule, layout, 0).placement;
  result.zero = zero;
  result.experts.assign(static_cast<std::size_t>(config.layers),
                        ExpertMap::even(config.moe.experts, layout.ep));
  const auto pieces = static_cast<std::int64_t>(result.pieces.size());
  static_cast<void>(model::shard_config(config, {.rank = 0, .ranks = layout.tp}));
  if (split.empty()) {
    if (pieces > config.layers) {
      throw InvalidArgument(
          kPlaceWhere,
          fmt::format("layout {}: {} stages x {} chunks are more pieces than the "
                      "model's {} layers; pp x chunks may be at most {}, or give the "
                      "layers of each piece",
                      layout.to_string(), layout.pp, layout.chunks, config.layers, config.layers));
    }
    split = plan::even_split(static_cast<int>(config.layers), static_cast<int>(pieces));
  }
  const bool negative = std::any_of(split.begin(), split.end(), [](int n) { return n < 0; });
  const auto sum = std::accumulate(split.begin(), split.end(), std::int64_t{0});
  if (negative || std::ssize(split) != pieces || sum != config.layers) {
    throw InvalidArgument(
        kPlaceWhere, fmt::format("split [{}]: expected {} numbers, none negative, that add up to "
                                 "{} layers",
                                 fmt::join(split, ", "), pieces, config.layers));
  }
  result.split = std::move(split);
  return result;
}

std::vector<int> split_by_cost(const model::ModelConfig& config, int pieces) {
  const auto met = [&](const model::ParameterSpec& spec) {
    const auto elements = static_cast<double>(spec.elements());
    if (spec.expert < 0) return elements;
    return elements * static_cast<double>(config.moe.experts_per_token) /
           static_cast<double>(config.moe.experts);
  };
  std::vector<double> layers(static_cast<std::size_t>(config.layers), 0.0);
  const model::ParameterTable table =
      model::parameter_table(config, {0, config.layers}, /*with_embedding=*/true,
                             /*with_head=*/true);
  for (const model::ParameterSpec& spec : table.parameters) {
    if (0 <= spec.layer && spec.layer < config.layers) {
      layers[static_cast<std::size_t>(spec.layer)] += met(spec);
    }
  }
  const auto head = static_cast<double>(config.vocab_size * config.hidden_size);
  return plan::level_split(layers, 0.0, head, pieces);
}

std::vector<std::shared_ptr<model::Stage>> build_stages(const ModelPlacement& placement,
                                                        const Coordinates& at) {
  std::vector<std::shared_ptr<model::Stage>> stages;
  for (const ChunkPlace& chunk : placement.chunks(at.pp)) {
    stages.push_back(model::build_stage(placement.config, chunk.layers, chunk.with_embedding,
                                        chunk.with_head,
                                        {.rank = at.tp, .ranks = placement.layout.tp}));
  }
  return stages;
}

}  // namespace meshloom::parallel
