#include "meshloom/parallel/model_state.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <span>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/tensor_block.h"
#include "parallel/internal/expert_moves.h"

namespace meshloom::parallel {
namespace {

constexpr comm::CallOptions kCollectCall{.timeout = std::nullopt, .purpose = "collect"};
/// Sums of micro-batches that may be under way at once: one travels while the next fills up.
constexpr std::size_t kFlushesInFlight = 1;

/// Copies the elements of `range` of a part's flat space to where they lie in the whole model.
void place(const model::ParameterTable& whole, at::Tensor& full, const model::ParameterTable& table,
           FlatRange range, const at::Tensor& shard) {
  for (const model::ParameterSpec& spec : table.parameters) {
    const std::int64_t begin = std::max(spec.offset, range.begin);
    const std::int64_t end = std::min(spec.offset + spec.elements(), range.end);
    if (begin >= end) continue;
    const model::ParameterSpec& target = whole.find(spec.name);
    const at::Tensor tensor = full.narrow(0, target.offset, target.elements()).view(target.shape);
    std::int64_t at = begin - range.begin;
    for (const model::TensorBlock& block :
         model::blocks_of_range(spec.shape, begin - spec.offset, end - spec.offset)) {
      at::Tensor box = tensor;
      for (std::size_t d = 0; d < spec.shape.size(); ++d) {
        const std::int64_t corner = spec.corner.empty() ? 0 : spec.corner[d];
        box = box.narrow(static_cast<std::int64_t>(d), corner + block.offset[d], block.extent[d]);
      }
      box.copy_(shard.narrow(0, at, block.elements()).view(block.extent));
      at += block.elements();
    }
  }
}

}  // namespace

ParameterState::~ParameterState() = default;

/// One model chunk's view of the parts: hands every call on to the part that has the parameter.
class ModelState::Chunk final : public model::ParameterSource, public model::WeightGradSink {
 public:
  Chunk(ModelState& state, model::ParameterTable table) : state_(state), table_(std::move(table)) {
    for (std::size_t p = 0; p < state_.parts_.size(); ++p) {
      for (const model::ParameterSpec& spec : state_.parts_[p].place.table.parameters) {
        if (table_.find_if(spec.name) == nullptr) continue;
        homes_.emplace(spec.name, Home{p, spec.offset});
        const auto add = [&](Layers& layers) {
          auto& parts = layers[spec.layer];
          if (std::find(parts.begin(), parts.end(), p) == parts.end()) parts.push_back(p);
        };
        add(parts_);
        if (state_.parts_[p].space.zero() == Zero::kParameters) add(layers_);
      }
    }
  }

  at::Tensor acquire(const model::ParameterHandle& handle) override {
    const std::vector<Piece>& pieces = locate(handle);
    if (pieces.size() == 1) return values(pieces.front());
    std::vector<at::Tensor> rows;
    for (const Piece& piece : pieces) rows.push_back(values(piece));
    return at::cat(rows, 0);
  }
  void release(const model::ParameterHandle& /*handle*/) override {}

  void linear(const model::ParameterHandle& handle, const at::Tensor& dy,
              const at::Tensor& x) override {
    for (const Piece& piece : locate(handle)) {
      buffer(piece).linear(piece.local, dy.narrow(1, piece.row, piece.local.shape.front()), x);
    }
  }
  void grouped_linear(const model::ParameterHandle& handle, const at::Tensor& dy,
                      const at::Tensor& x, const std::vector<std::int64_t>& rows) override {
    const Piece& piece = locate(handle).front();
    buffer(piece).grouped_linear(piece.local, dy, x, rows);
  }
  void embedding(const model::ParameterHandle& handle, const at::Tensor& ids,
                 const at::Tensor& dy) override {
    const Piece& piece = locate(handle).front();
    buffer(piece).embedding(piece.local, ids, dy);
  }
  void add(const model::ParameterHandle& handle, const at::Tensor& value) override {
    for (const Piece& piece : locate(handle)) {
      buffer(piece).add(piece.local, value.narrow(0, piece.row, piece.local.shape.front()));
    }
  }
  void layer_done(std::int64_t layer) override { state_.layer_done(*this, layer); }

  void begin(Pass pass, bool last_pass) {
    forward_ = pass == Pass::kForward;
    last_ = last_pass;
    here_ = layers_.end();
  }
  void drop() {
    for (const auto& [layer, parts] : layers_) drop_layer(parts);
    here_ = layers_.end();
  }
  [[nodiscard]] bool last() const { return last_; }
  [[nodiscard]] std::span<const std::size_t> parts_of(std::int64_t layer) const {
    const auto found = parts_.find(layer);
    return found == parts_.end() ? std::span<const std::size_t>() : found->second;
  }

 private:
  /// Where a parameter of this chunk is held.
  struct Home {
    std::size_t part = 0;
    std::int64_t offset = 0;
  };
  /// Rows [row, row + local.shape[0]) of a handle, which lie together in one part.
  struct Piece {
    std::size_t part = 0;
    model::ParameterHandle local;
    std::int64_t row = 0;
    std::int64_t layer = 0;
  };
  using Layers = std::map<std::int64_t, std::vector<std::size_t>>;

  const std::vector<Piece>& locate(const model::ParameterHandle& handle) {
    const auto key = std::pair(handle.offset, handle.shape.front());
    const auto found = located_.find(key);
    if (found != located_.end()) return found->second;
    return located_.emplace(key, find(handle)).first->second;
  }

  [[nodiscard]] std::vector<Piece> find(const model::ParameterHandle& handle) const {
    std::int64_t count = 1;
    for (const std::int64_t extent : handle.shape) count *= extent;
    const std::int64_t row_elements = count / std::max<std::int64_t>(1, handle.shape.front());
    std::vector<Piece> pieces;
    std::int64_t row = 0;
    const auto first = std::partition_point(
        table_.parameters.begin(), table_.parameters.end(),
        [&](const model::ParameterSpec& spec) { return spec.offset < handle.offset; });
    MESHLOOM_CHECK(first != table_.parameters.end() && first->offset == handle.offset,
                   "parallel.model_state", "a handle that begins inside a parameter");
    std::int64_t elements = 0;  // of the last piece
    const auto finish = [&] {
      if (pieces.empty()) return;
      Piece& last = pieces.back();
      last.local.shape = handle.shape;
      last.local.shape.front() = elements / row_elements;
      row += last.local.shape.front();
    };
    for (auto spec = first; spec != table_.parameters.end() && spec->offset < handle.offset + count;
         ++spec) {
      const auto home = homes_.find(spec->name);
      if (home == homes_.end()) continue;  // another rank's expert
      const auto [part, offset] = home->second;
      if (pieces.empty() || pieces.back().part != part) {
        finish();
        pieces.push_back({.part = part, .local = {offset, {}}, .row = row, .layer = spec->layer});
        elements = 0;
      }
      MESHLOOM_CHECK_EQ(offset, pieces.back().local.offset + elements, "parallel.model_state",
                        "neighbours of a fused weight");
      elements += spec->elements();
    }
    finish();
    if (pieces.empty()) {  // no expert of the layer is held here
      pieces.push_back({.part = kNowhere, .local = {0, handle.shape}, .layer = first->layer});
      pieces.back().local.shape.front() = 0;
    }
    return pieces;
  }

  at::Tensor values(const Piece& piece) {
    state_.advance();
    enter(piece.layer);
    if (piece.part == kNowhere) {
      return at::empty(piece.local.shape,
                       at::TensorOptions().dtype(state_.compute_).device(state_.device_));
    }
    return flat(state_.parts_[piece.part].space.values()).acquire(piece.local);
  }

  /// The layer's sharded parameters come, and those of the layer after it; others go. Backward does
  /// not read the embedding, and what follows a head that is the embedding is no layer.
  void enter(std::int64_t layer) {
    if (here_ != layers_.end() && here_->first == layer) return;
    const auto next = layers_.find(layer);
    if (next == layers_.end()) return;
    const auto after = [&](Layers::iterator at) {
      if (at == layers_.end()) return at;
      if (forward_) return std::next(at);
      return at == layers_.begin() ? layers_.end() : std::prev(at);
    };
    const bool in_turn = here_ == layers_.end() || after(here_) == next;
    if (here_ != layers_.end()) drop_layer(here_->second);
    here_ = next;
    fetch_layer(here_->second);
    const auto coming = after(here_);
    if (in_turn && coming != layers_.end() && (forward_ || coming->first >= 0)) {
      fetch_layer(coming->second);
    }
  }
  void fetch_layer(const std::vector<std::size_t>& parts) {
    for (const std::size_t part : parts) state_.parts_[part].space.fetch();
  }
  void drop_layer(const std::vector<std::size_t>& parts) {
    for (const std::size_t part : parts) state_.parts_[part].space.drop();
  }

  [[nodiscard]] static model::FlatParameters flat(const at::Tensor& buffer) {
    return {buffer, buffer};
  }
  model::FlatParameters buffer(const Piece& piece) {
    if (piece.part == kNowhere) {
      const auto type = state_.compute_ == at::kDouble ? at::kDouble : at::kFloat;
      return flat(at::empty({0}, at::TensorOptions().dtype(type).device(state_.device_)));
    }
    return flat(state_.parts_[piece.part].space.gradients());
  }

  static constexpr std::size_t kNowhere = static_cast<std::size_t>(-1);

  ModelState& state_;
  model::ParameterTable table_;
  std::map<std::string, Home> homes_;
  Layers parts_;   ///< by layer, ascending
  Layers layers_;  ///< those whose values are sharded
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<Piece>> located_;
  bool forward_ = true;
  bool last_ = false;
  Layers::iterator here_ = layers_.end();
};

ModelState::ModelState(ModelPlacement placement, Groups& groups, at::ScalarType compute,
                       at::Device device)
    : placement_(std::move(placement)), world_(groups.world()), compute_(compute), device_(device) {
  for (PlacedPart& part : placement_.parts(world_.rank())) {
    const Replicas& replicas = groups.replicas(part.set);
    MESHLOOM_CHECK_EQ(static_cast<int>(part.replicas.ranks.size()), replicas.size(),
                      "parallel.model_state", "ranks that share a part's parameters");
    ShardedSpace space(part.table, replicas, part.zero, compute, device);
    parts_.push_back({.place = std::move(part), .space = std::move(space)});
  }
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    if (parts_[p].space.zero() == Zero::kOptimizer) summed_once_.push_back(p);
  }
  ready_.assign(parts_.size(), false);
  for (const ReplicaSet set : kReplicaSets) {
    const auto has = [&](const Part& part) { return part.place.set == set; };
    if (std::any_of(parts_.begin(), parts_.end(), has)) replicas_.push_back(groups.replicas(set));
  }
  make_chunks();
}

ModelState::~ModelState() = default;

void ModelState::make_chunks() {
  chunks_.clear();
  const int stage = placement_.layout.coordinates(world_.rank()).pp;
  for (const ChunkPlace& chunk : placement_.chunks(stage)) {
    chunks_.push_back(std::make_unique<Chunk>(*this, placement_.chunk_table(chunk, world_.rank())));
  }
}

void ModelState::check_experts(const std::vector<ExpertMap>& next) const {
  MESHLOOM_CHECK_EQ(next.size(), placement_.experts.size(), "parallel.model_state.experts",
                    "layers that experts are placed for");
  for (std::size_t layer = 0; layer < next.size(); ++layer) {
    MESHLOOM_CHECK(next[layer].same_numbers(placement_.experts[layer]),
                   "parallel.model_state.experts",
                   fmt::format("layer {}: members are to hold other numbers of experts than they "
                               "do, or there are other members",
                               layer));
  }
}

void ModelState::place_experts(const std::vector<ExpertMap>& next) {
  check_experts(next);
  placement_.experts = next;
  std::vector<PlacedPart> placed = placement_.parts(world_.rank());
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    parts_[p].space.rename(placed[p].table);
    parts_[p].place = std::move(placed[p]);
  }
  make_chunks();
}

void ModelState::move_experts(const std::vector<ExpertMap>& next,
                              const std::vector<std::vector<at::Tensor>>& beside) {
  check_experts(next);
  MESHLOOM_CHECK_EQ(beside.size(), parts_.size(), "parallel.model_state.experts",
                    "parts that something is kept for");
  const detail::ExpertMoves moves(placement_, placement_.layout.coordinates(world_.rank()).pp,
                                  next);
  for (const std::int64_t layer : moves.layers()) {
    const auto holds = [&](const Part& part) {
      return part.place.set == ReplicaSet::kExpert && part.place.first_layer <= layer &&
             layer <= part.place.last_layer;
    };
    const auto found = std::find_if(parts_.begin(), parts_.end(), holds);
    if (found == parts_.end()) continue;  // a member without experts
    const std::vector<detail::ExpertRun> shards = moves.runs(layer, false);
    for (const ShardedSpace::Kept& kept : found->space.kept()) {
      detail::move_runs(world_, kept.whole ? moves.runs(layer, true) : shards, kept.tensor);
    }
    for (const at::Tensor& tensor : beside[static_cast<std::size_t>(found - parts_.begin())]) {
      detail::move_runs(world_, shards, tensor);
    }
  }
  place_experts(next);
}

model::ParameterSource& ModelState::source(int chunk) {
  return *chunks_.at(static_cast<std::size_t>(chunk));
}

model::WeightGradSink& ModelState::sink(int chunk) {
  return *chunks_.at(static_cast<std::size_t>(chunk));
}

void ModelState::begin_pass(int chunk, Pass pass, bool last) {
  chunks_.at(static_cast<std::size_t>(chunk))->begin(pass, last);
}

void ModelState::end_pass(int chunk) {
  chunks_.at(static_cast<std::size_t>(chunk))->drop();
  finish_flushes(0);
}

void ModelState::layer_done(Chunk& chunk, std::int64_t layer) {
  advance();
  for (const std::size_t index : chunk.parts_of(layer)) {
    Part& part = parts_[index];
    if (part.place.first_layer != layer || part.place.set == ReplicaSet::kTied) continue;
    if (part.space.zero() == Zero::kOptimizer) {
      ready_[index] = ready_[index] || chunk.last();
      continue;
    }
    part.space.start_reduce();
    flushing_.push_back(index);
    finish_flushes(kFlushesInFlight);
  }
  while (started_ < summed_once_.size() && ready_[summed_once_[started_]]) {
    parts_[summed_once_[started_++]].space.start_reduce();
  }
}

void ModelState::advance() {
  for (Replicas& replicas : replicas_) replicas.advance();
}

void ModelState::finish_flushes(std::size_t keep) {
  while (flushing_.size() > keep) {
    parts_[flushing_.front()].space.finish_reduce();
    flushing_.erase(flushing_.begin());
  }
}

void ModelState::zero_gradients() {
  for (Part& part : parts_) part.space.zero_gradients();
  ready_.assign(parts_.size(), false);
  started_ = 0;
}

void ModelState::reduce() {
  while (started_ < summed_once_.size()) parts_[summed_once_[started_++]].space.start_reduce();
  for (const std::size_t part : summed_once_) parts_[part].space.finish_reduce();
}

void ModelState::gather() {
  Part* former = nullptr;
  for (Part& part : parts_) {
    part.space.start_gather();
    if (former != nullptr) former->space.finish_gather();
    former = &part;
  }
  if (former != nullptr) former->space.finish_gather();
}

void ModelState::assign(
    const std::function<void(const model::ParameterTable& table, at::Tensor& values)>& fill) {
  for (Part& part : parts_) {
    at::Tensor values = at::empty({part.place.table.elements}, part.space.master().scalar_type());
    fill(part.place.table, values);
    part.space.assign(values);
  }
}

at::Tensor ModelState::collect(const std::function<at::Tensor(const ShardedSpace&)>& shard,
                               bool everywhere) {
  std::vector<at::Tensor> own;
  for (const Part& part : parts_) own.push_back(shard(part.space));
  const at::Tensor flat = at::cat(own);
  const int size = world_.size();
  std::vector<std::vector<PlacedPart>> of_rank;
  std::vector<std::int64_t> elements;
  const auto range_of = [](const PlacedPart& part, int rank) {
    const std::vector<int>& ranks = part.replicas.ranks;
    const auto found = std::find(ranks.begin(), ranks.end(), rank);
    return owned_range(part.table.elements, static_cast<int>(found - ranks.begin()),
                       static_cast<int>(ranks.size()));
  };
  if (everywhere || world_.rank() == 0) {
    for (int rank = 0; rank < size; ++rank) {
      of_rank.push_back(placement_.parts(rank));
      elements.push_back(0);
      for (const PlacedPart& part : of_rank.back()) {
        elements.back() += range_of(part, rank).size();
      }
    }
  }
  std::vector<at::Tensor> all;
  if (everywhere) {
    const at::Tensor joined = world_.all_gather(flat, elements, kCollectCall).result();
    std::int64_t begin = 0;
    for (const std::int64_t count : elements) {
      all.push_back(joined.narrow(0, begin, count));
      begin += count;
    }
  } else if (world_.rank() == 0) {
    all.push_back(flat);
    std::vector<comm::Transfer> receives;
    all.reserve(static_cast<std::size_t>(size));
    for (int rank = 1; rank < size; ++rank) {
      all.push_back(at::empty({elements[static_cast<std::size_t>(rank)]}, flat.options()));
      receives.push_back({.peer = rank, .tensor = &all.back()});
    }
    world_.send_receive({}, receives, kCollectCall).wait();
  } else {
    const comm::Transfer send{.peer = 0, .tensor = &flat};
    world_.send_receive({&send, 1}, {}, kCollectCall).wait();
    return {};
  }
  const model::ParameterTable whole =
      model::parameter_table(placement_.config, {0, placement_.config.layers}, true, true);
  at::Tensor full = at::empty({whole.elements}, flat.options());
  for (int rank = 0; rank < size; ++rank) {
    std::int64_t begin = 0;
    for (const PlacedPart& part : of_rank[static_cast<std::size_t>(rank)]) {
      const FlatRange range = range_of(part, rank);
      place(whole, full, part.table, range,
            all[static_cast<std::size_t>(rank)].narrow(0, begin, range.size()));
      begin += range.size();
    }
  }
  return full;
}

at::Tensor ModelState::whole_gradients() {
  return collect([](const ShardedSpace& space) { return space.shard_gradient(); }, true);
}

at::Tensor ModelState::whole_values() {
  return collect([](const ShardedSpace& space) { return space.shard_values(); }, false);
}

}  // namespace meshloom::parallel
