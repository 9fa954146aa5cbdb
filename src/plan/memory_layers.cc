#include "plan/internal/memory_layers.h"

#include <algorithm>
#include <utility>

namespace meshloom::plan::detail {
namespace {

constexpr std::int64_t kIndexBytes = 8;
constexpr std::int64_t kLogitBytes = std::int64_t{16} << 20;  // of a chunk
constexpr std::int64_t kLogitRows = 64;                       // of a chunk, at least
// Of a product's packed operand, src/model/kernels/product_driver.h.
constexpr std::int64_t kSlab = 256;
constexpr std::int64_t kPackedElements = std::int64_t{1} << 19;
constexpr std::int64_t kTaskColumns = 256;
constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;  // of a reduction, from one peer

/// What rank r of n holds of `size`.
std::int64_t part(std::int64_t size, int rank, int ranks) {
  return size * (rank + 1) / ranks - size * rank / ranks;
}

}  // namespace

LayerMemory::LayerMemory(const MemorySetting& setting, int tp_rank, MemoryLedger& ledger)
    : ledger_(ledger),
      model_(setting.model),
      tp_(setting.layout.tp),
      ep_(setting.layout.ep),
      selective_(setting.recompute == "selective"),
      full_(setting.recompute == "full"),
      b_(setting.element_bytes),
      s_(setting.wide_bytes()),
      heads_(part(model_.heads, tp_rank, tp_)),
      key_value_heads_(std::max<std::int64_t>(1, part(model_.key_value_heads, tp_rank, tp_))),
      inner_(part(model_.intermediate, tp_rank, tp_)),
      shared_inner_(part(model_.shared_intermediate, tp_rank, tp_)),
      vocabulary_(part(model_.vocabulary, tp_rank, tp_)) {}

void LayerMemory::save(MemoryFlow& flow, MemoryPart part, const Held& held) {
  if (!flow.saves) return;
  held->become(part);
  flow.saved.push_back(held);
}

Held LayerMemory::restore(MemoryFlow& flow) {
  Held held = std::move(flow.saved.back());
  flow.saved.pop_back();
  return held;
}

void LayerMemory::product(std::int64_t depth, std::int64_t columns) {
  if (b_ < s_) return;  // left to the tensor library
  const std::int64_t widest = std::min(columns, kPackedElements / kSlab);
  const std::int64_t wide = (widest + kTaskColumns - 1) / kTaskColumns * kTaskColumns;
  const std::int64_t deep = std::min(depth, kPackedElements / wide / kSlab * kSlab);
  work(deep * wide * b_).reset();
}

void LayerMemory::gradient(MemoryFlow& flow, const Held& dy, const Held& x, std::int64_t rows,
                           std::int64_t columns) {
  if (!flow.defers) return product(rows, columns);
  flow.deferred.push_back(dy);
  flow.deferred.push_back(x);
}

void LayerMemory::need(Buffer& buffer, std::int64_t bytes) {
  if (bytes <= buffer.bytes) return;
  buffer.held.reset();
  buffer.bytes = bytes;
  buffer.held = hold(MemoryPart::kExchange, bytes);
}

Held LayerMemory::stream_rows(const MemoryFlow& flow, MemoryPart part) {
  return hold(part, flow.own * model_.hidden * b_);
}

// Tensor parallelism, src/parallel/tensor_parallel.cc.

Held LayerMemory::gather(const MemoryFlow& flow) {
  if (tp_ == 1) return {};
  return hold(MemoryPart::kCommunication, flow.all * model_.hidden * b_);
}

/// Peers' parts come piece by piece.
Held LayerMemory::scatter(const MemoryFlow& flow, Held partial) {
  if (tp_ == 1) return partial;
  Held rows = stream_rows(flow, MemoryPart::kWorkspace);
  const Held scratch = hold(MemoryPart::kCommunication,
                            (tp_ - 1) * std::min(kPieceBytes, flow.own * model_.hidden * b_));
  return rows;
}

Held LayerMemory::column(const MemoryFlow& flow, std::int64_t width) {
  const Held all = gather(flow);
  Held y = work(flow.all * width * b_);
  product(model_.hidden, width);
  return y;
}

Held LayerMemory::row(const MemoryFlow& flow, std::int64_t width) {
  Held partial = work(flow.all * model_.hidden * b_);
  product(width, model_.hidden);
  return scatter(flow, std::move(partial));
}

Held LayerMemory::column_backward(MemoryFlow& flow, std::int64_t width, const Held& dy,
                                  const Held& x) {
  if (tp_ == 1) gradient(flow, dy, x, flow.all, model_.hidden);
  const Held all = gather(flow);
  Held partial = work(flow.all * model_.hidden * b_);
  product(width, model_.hidden);
  if (tp_ == 1) return partial;
  // The input's gradient travels beside the weight's.
  Held dx = stream_rows(flow, MemoryPart::kWorkspace);
  const Held scratch = hold(MemoryPart::kCommunication,
                            (tp_ - 1) * std::min(kPieceBytes, flow.own * model_.hidden * b_));
  gradient(flow, dy, all, flow.all, model_.hidden);
  return dx;
}

// Element-wise layers. Compute types narrower than their statistics take wide copies on the way.

Held LayerMemory::normalize(const MemoryFlow& flow) {
  Held wide;
  if (b_ < s_) wide = work(flow.own * model_.hidden * (2 * s_ + b_));
  return work(flow.own * (model_.hidden + 1) * b_);
}

Held LayerMemory::swiglu(std::int64_t rows, std::int64_t inner) {
  Held wide;
  if (b_ < s_) wide = work(rows * inner * 3 * s_);
  return work(rows * inner * b_);
}

void LayerMemory::swiglu_backward(std::int64_t rows, std::int64_t inner) {
  if (b_ < s_) work(rows * inner * 9 * s_).reset();
}

// Feed-forward layers, src/model/mlp_layers.cc.

Held LayerMemory::dense(MemoryFlow& flow, std::int64_t inner) {
  Held gate_up = column(flow, 2 * inner);
  const Held activation = swiglu(flow.all, inner);
  if (!selective_) save(flow, MemoryPart::kFeedForward, gate_up);
  gate_up.reset();
  return row(flow, inner);
}

Held LayerMemory::dense_backward(MemoryFlow& flow, std::int64_t inner, const Held& dy,
                                 const Held& x) {
  const Held gate_up = selective_ ? column(flow, 2 * inner) : restore(flow);
  {
    const Held all = gather(flow);
    const Held activation = work(flow.all * inner * b_);
    product(model_.hidden, inner);
    swiglu_backward(flow.all, inner);
    gradient(flow, all ? all : dy, activation, flow.all, inner);
  }
  return column_backward(flow, 2 * inner, gate_up, x);
}

// Rows that come over the network are kept, others are copied again; src/parallel's
// expert_dispatcher.cc.
Held LayerMemory::experts(MemoryFlow& flow) {
  const std::int64_t pairs = flow.own * model_.experts_per_token;
  const std::int64_t inner = model_.expert_intermediate;
  const std::int64_t row_bytes = model_.hidden * b_;
  const bool sorts = model_.experts / ep_ > 1;
  Held logits = work(flow.own * model_.experts * b_);
  const Held routing = work(flow.own * (model_.experts + 1) * s_ + pairs * (s_ + kIndexBytes));
  logits.reset();
  const Held source = work(pairs * kIndexBytes);
  Held shared;
  Held rows;
  if (ep_ > 1) {
    const Held sent = hold(MemoryPart::kCommunication, pairs * row_bytes);
    rows = hold(MemoryPart::kCommunication, pairs * row_bytes);
    if (shared_inner_ > 0) shared = dense(flow, shared_inner_);
    if (sorts) {
      const Held order = work(pairs * kIndexBytes);
      rows = work(pairs * row_bytes);
    }
  } else {
    rows = work(pairs * row_bytes);
    if (shared_inner_ > 0) shared = dense(flow, shared_inner_);
  }
  Held gate_up = work(pairs * 2 * inner * b_);
  product(model_.hidden, 2 * inner);
  if (ep_ == 1) rows.reset();
  const Held activation = swiglu(pairs, inner);
  if (!selective_) save(flow, MemoryPart::kFeedForward, gate_up);
  if (ep_ > 1) save(flow, MemoryPart::kFeedForward, rows);
  save(flow, MemoryPart::kFeedForward, source);
  save(flow, MemoryPart::kFeedForward, routing);
  gate_up.reset();
  rows.reset();
  const Held y = work(pairs * row_bytes);
  product(inner, model_.hidden);
  Held sorted;
  Held back;
  if (ep_ > 1) {
    if (sorts) sorted = hold(MemoryPart::kCommunication, pairs * (row_bytes + kIndexBytes));
    back = hold(MemoryPart::kCommunication, pairs * row_bytes);
    sorted.reset();
  }
  return stream_rows(flow, MemoryPart::kWorkspace);
}

Held LayerMemory::experts_backward(MemoryFlow& flow, const Held& dy, const Held& x) {
  const std::int64_t pairs = flow.own * model_.experts_per_token;
  const std::int64_t inner = model_.expert_intermediate;
  const std::int64_t row_bytes = model_.hidden * b_;
  const bool sorts = model_.experts / ep_ > 1;
  const std::int64_t of_expert = pairs * ep_ / model_.experts;  // rows
  const Held routing = restore(flow);
  const Held source = restore(flow);
  Held rows;
  if (ep_ > 1) rows = restore(flow);
  Held gate_up;
  Held combined;
  Held dshared;
  {
    Held sent = ep_ > 1 ? hold(MemoryPart::kCommunication, pairs * row_bytes) : Held();
    combined =
        ep_ > 1 ? hold(MemoryPart::kCommunication, pairs * row_bytes) : work(pairs * row_bytes);
    if (selective_) {
      if (!rows) rows = work(pairs * row_bytes);
      gate_up = work(pairs * 2 * inner * b_);
    } else {
      gate_up = restore(flow);
    }
    if (shared_inner_ > 0) dshared = dense_backward(flow, shared_inner_, dy, x);
    if (ep_ > 1 && sorts) {
      const Held order = work(pairs * kIndexBytes);
      combined = work(pairs * row_bytes);
    }
  }
  {
    const Held activation = work(pairs * inner * b_);
    swiglu_backward(pairs, inner);
    gradient(flow, combined, activation, of_expert, inner);
  }
  combined.reset();
  if (!rows) rows = work(pairs * row_bytes);
  gradient(flow, gate_up, rows, of_expert, model_.hidden);
  rows.reset();
  Held drows = work(pairs * row_bytes);
  product(2 * inner, model_.hidden);
  gate_up.reset();
  Held sorted;
  Held back;
  if (ep_ > 1) {
    if (sorts) sorted = hold(MemoryPart::kCommunication, pairs * (row_bytes + kIndexBytes));
    back = hold(MemoryPart::kCommunication, pairs * row_bytes);
  }
  Held dx = stream_rows(flow, MemoryPart::kWorkspace);
  sorted.reset();
  back.reset();
  drows.reset();
  const Held dlogits = work(flow.own * model_.experts * b_);
  gradient(flow, dlogits, x, flow.own, model_.hidden);
  return dx;
}

// Decoder layers and the ends of the model, src/model/stage.cc.

void LayerMemory::forward(MemoryFlow& flow, std::int64_t layer, Stream& h) {
  if (!full_ || !flow.saves) {
    (void)forward_kept(flow, layer, h);
    return;
  }
  if (h.pending) h = {std::move(h.pending), {}};
  save(flow, MemoryPart::kStream, h.stream);
  flow.saves = false;
  (void)forward_kept(flow, layer, h);
  flow.saves = true;
}

void LayerMemory::backward(MemoryFlow& flow, std::int64_t layer, Held& dh) {
  if (full_) {
    Stream h{restore(flow), {}};
    (void)forward_kept(flow, layer, h);
  }
  backward_kept(flow, layer, dh);
}

Held LayerMemory::forward_kept(MemoryFlow& flow, std::int64_t layer, Stream& h) {
  Held x = normalize(flow);
  if (h.pending) h = {std::move(h.pending), {}};
  h.pending = attention(flow);
  save(flow, MemoryPart::kStream, h.stream);
  x = normalize(flow);
  h = {std::move(h.pending), {}};
  h.pending =
      model_.moe_layers[static_cast<std::size_t>(layer)] ? experts(flow) : dense(flow, inner_);
  save(flow, MemoryPart::kStream, h.stream);
  return x;
}

void LayerMemory::backward_kept(MemoryFlow& flow, std::int64_t layer, Held& dh) {
  const auto sublayer = [&](const auto& backward) {
    const Held input = restore(flow);
    Held dx;
    {
      const Held x = normalize(flow);
      dx = backward(x);
    }
    if (flow.defers) dh = stream_rows(flow, MemoryPart::kWorkspace);
    if (b_ < s_) work(flow.own * model_.hidden * 4 * s_).reset();
  };
  sublayer([&](const Held& x) {
    return model_.moe_layers[static_cast<std::size_t>(layer)] ? experts_backward(flow, dh, x)
                                                              : dense_backward(flow, inner_, dh, x);
  });
  sublayer([&](const Held& x) { return attention_backward(flow, dh, x); });
}

Held LayerMemory::tables(const MemoryFlow& flow) {
  return hold(MemoryPart::kStream, flow.all * model_.rotated() * s_);
}

Held LayerMemory::embedding(const MemoryFlow& flow) {
  if (tp_ == 1) return stream_rows(flow, MemoryPart::kWorkspace);
  Held partial = work(flow.all * model_.hidden * b_);
  work(flow.all / tp_ * (model_.hidden * b_ + 2 * kIndexBytes)).reset();
  return scatter(flow, std::move(partial));
}

void LayerMemory::embedding_backward(const MemoryFlow& flow) {
  if (tp_ == 1) return;
  const Held all = gather(flow);
  work(flow.all / tp_ * (model_.hidden * b_ + 2 * kIndexBytes)).reset();
}

/// Loss and its gradient, chunk by chunk of logits.
void LayerMemory::head(MemoryFlow& flow, Stream& h, const std::function<void()>& touch) {
  const Held normed = normalize(flow);
  if (h.pending) h = {std::move(h.pending), {}};
  const Held all = gather(flow);
  Held dhidden = work(flow.all * model_.hidden * b_);
  const Held targets = work(flow.all * 2 * kIndexBytes);
  const std::int64_t rows = std::min(
      flow.all, std::max(kLogitRows, kLogitBytes / std::max<std::int64_t>(1, vocabulary_ * b_)));
  {
    const std::int64_t numbers = rows * vocabulary_;
    const Held x = hold(MemoryPart::kLogits, rows * model_.hidden * b_);
    // Tensor ranks merge their parts' statistics between two passes over a chunk.
    const std::int64_t copies = tp_ > 1 ? numbers * s_ : 0;
    const std::int64_t wide = b_ < s_ ? numbers * (tp_ > 1 ? 1 : 3) * s_ : 0;
    const Held logits = hold(MemoryPart::kLogits, numbers * b_ + copies + wide);
    const auto chunk = [&] {
      product(model_.hidden, vocabulary_);
      const Held dx = hold(MemoryPart::kLogits, rows * model_.hidden * b_);
      product(vocabulary_, model_.hidden);
    };
    chunk();
    touch();
    product(rows, model_.hidden);
    if (rows < flow.all) chunk();
  }
  if (tp_ > 1) dhidden = scatter(flow, std::move(dhidden));
  save(flow, MemoryPart::kStream, h.stream);
  save(flow, MemoryPart::kStream, dhidden);
}

Held LayerMemory::head_backward(MemoryFlow& flow) {
  const Held dnormed = restore(flow);
  const Held input = restore(flow);
  return stream_rows(flow, MemoryPart::kWorkspace);
}

}  // namespace meshloom::plan::detail
