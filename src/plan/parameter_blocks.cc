#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "meshloom/plan/memory_forecast.h"
#include "meshloom/plan/schedule.h"

namespace meshloom::plan {
namespace {

/// Sets of ranks that share parameters, in the order of parallel::ReplicaSet.
enum Set : std::size_t { kDense, kReplicated, kKeyValue, kExpert, kTied, kSets };
constexpr int kParametersSharded = 3;

class Blocks {
 public:
  Blocks(const MemorySetting& setting, int rank)
      : setting_(setting), model_(setting.model), layout_(setting.layout) {
    at_ = layout_.coordinates(rank);
    placement_ = make_schedule(setting.schedule, layout_, 0).placement;
    pieces_ = static_cast<int>(placement_.size());
    split_ = setting.split.empty() ? even_split(static_cast<int>(model_.layers()), pieces_)
                                   : setting.split;
    replicas_ = {layout_.hdp, layout_.hdp * layout_.tp,
                 layout_.hdp * std::max(1, layout_.tp / static_cast<int>(model_.key_value_heads)),
                 layout_.hdp / layout_.ep * layout_.tp,
                 layout_.hdp * (placement_.front().stage == placement_.back().stage ? 1 : 2)};
  }

  std::vector<ParameterBlock> list() {
    std::int64_t last = model_.layers();
    for (int piece = pieces_ - 1; piece >= 0; --piece) {
      const std::int64_t first = last - split_[static_cast<std::size_t>(piece)];
      if (placement_[static_cast<std::size_t>(piece)].stage == at_.pp)
        add_piece(piece, first, last);
      last = first;
    }
    std::stable_sort(found_.begin(), found_.end(), [](const Entry& a, const Entry& b) {
      const auto key = [](const Entry& entry) {
        return std::tuple(entry.block.tied, -entry.block.piece, -entry.block.first_layer,
                          entry.set);
      };
      return key(a) < key(b);
    });
    std::vector<ParameterBlock> result;
    for (const Entry& entry : found_) result.push_back(entry.block);
    return result;
  }

 private:
  struct Entry {
    Set set;
    ParameterBlock block;
  };

  void add_piece(int piece, std::int64_t first, std::int64_t last) {
    open_.fill(kNone);
    piece_ = piece;
    const bool with_head = piece + 1 == pieces_;
    const bool tied = model_.tied_embeddings;
    if (with_head) {
      add(kReplicated, model_.layers(), model_.hidden);
      if (!tied) add(kDense, model_.layers(), vocabulary());
    }
    for (std::int64_t layer = last - 1; layer >= first; --layer) {
      const LayerParameters own = layer_parameters(model_, layer, at_.tp, layout_.tp);
      add(kDense, layer, own.split);
      add(kReplicated, layer, own.replicated);
      add(kKeyValue, layer, own.key_value);
      add(kExpert, layer, own.expert * experts());
    }
    if (piece == 0 || (with_head && tied)) {
      const bool shared = tied && pieces_ > 1;
      if (shared && std::exchange(tied_there_, true)) return;
      add(shared ? kTied : kDense, -1, vocabulary());
    }
  }

  void add(Set set, std::int64_t layer, std::int64_t elements) {
    if (elements == 0) return;
    // What only one axis tells apart is one set without it.
    if (set == kKeyValue && replicas_[kKeyValue] == replicas_[kReplicated]) set = kReplicated;
    if (layout_.tp == 1 && set == kReplicated) set = kDense;
    if (layout_.ep * layout_.tp == 1 && set == kExpert) set = kDense;
    std::size_t& open = open_[set];
    if (open != kNone) {
      const ParameterBlock& block = found_[open].block;
      const bool full =
          block.zero == kParametersSharded || block.elements >= setting_.bucket_elements;
      if (block.first_layer != layer && full) open = kNone;
    }
    if (open == kNone) {
      open = found_.size();
      const bool small = set == kReplicated || set == kKeyValue;
      const bool keeps = set == kTied || (small && setting_.zero == kParametersSharded);
      found_.push_back({set,
                        {.elements = 0,
                         .replicas = replicas_[set],
                         .zero = keeps ? 1 : setting_.zero,
                         .piece = piece_,
                         .first_layer = layer,
                         .last_layer = layer,
                         .tied = set == kTied}});
    }
    ParameterBlock& block = found_[open].block;
    block.first_layer = layer;
    block.elements += elements;
  }

  [[nodiscard]] std::int64_t vocabulary() const {
    const std::int64_t size = model_.vocabulary;
    return (size * (at_.tp + 1) / layout_.tp - size * at_.tp / layout_.tp) * model_.hidden;
  }
  [[nodiscard]] std::int64_t experts() const {
    const int member = at_.hdp % layout_.ep;
    return model_.experts * (member + 1) / layout_.ep - model_.experts * member / layout_.ep;
  }

  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  const MemorySetting& setting_;
  const ModelSizes& model_;
  const Layout& layout_;
  Coordinates at_;
  std::vector<StageChunk> placement_;
  std::vector<int> split_;
  int pieces_ = 1;
  int piece_ = 0;
  bool tied_there_ = false;
  std::array<int, kSets> replicas_{};
  std::array<std::size_t, kSets> open_{};
  std::vector<Entry> found_;
};

}  // namespace

std::vector<ParameterBlock> parameter_blocks(const MemorySetting& setting, int rank) {
  setting.validate();
  return Blocks(setting, rank).list();
}

}  // namespace meshloom::plan
