#include "model/kernels/attention_driver.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <vector>

#include "model/kernels/dispatch.h"

namespace meshloom::model::kernels {
namespace {

/// Drops what no query sees: empty blocks, keys after the last query or before the first window.
std::vector<AttentionBlock> trimmed(std::span<const AttentionBlock> blocks, std::int64_t window) {
  std::vector<AttentionBlock> kept;
  for (AttentionBlock block : blocks) {
    if (block.q_rows == 0) continue;
    const std::int64_t end = block.q_position + block.q_rows - block.k_position;
    const std::int64_t begin =
        window > 0 ? std::max<std::int64_t>(block.q_position - window + 1 - block.k_position, 0)
                   : 0;
    block.k_rows = std::min(block.k_rows, end) - begin;
    if (block.k_rows <= 0) continue;
    block.k_begin += begin;
    block.k_position += begin;
    kept.push_back(block);
  }
  return kept;
}

/// Row ranges without overlap.
class DisjointRanges {
 public:
  [[nodiscard]] bool overlaps(std::int64_t begin, std::int64_t end) const {
    const auto after = ranges_.lower_bound(end);
    return after != ranges_.begin() && std::prev(after)->second > begin;
  }
  void insert(std::int64_t begin, std::int64_t end) { ranges_.emplace(begin, end); }
  void clear() { ranges_.clear(); }

 private:
  std::map<std::int64_t, std::int64_t> ranges_;
};

/// Cuts the list into runs whose blocks share no query rows (with_keys: nor key rows): blocks of a
/// run may go in any order, runs go one after the other.
std::vector<std::span<const AttentionBlock>> runs_of(const std::vector<AttentionBlock>& blocks,
                                                     bool with_keys) {
  std::vector<std::span<const AttentionBlock>> runs;
  DisjointRanges queries;
  DisjointRanges keys;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const AttentionBlock& b = blocks[i];
    if (queries.overlaps(b.q_begin, b.q_begin + b.q_rows) ||
        (with_keys && keys.overlaps(b.k_begin, b.k_begin + b.k_rows))) {
      runs.emplace_back(blocks.data() + begin, i - begin);
      begin = i;
      queries.clear();
      keys.clear();
    }
    queries.insert(b.q_begin, b.q_begin + b.q_rows);
    if (with_keys) keys.insert(b.k_begin, b.k_begin + b.k_rows);
  }
  if (begin < blocks.size()) runs.emplace_back(blocks.data() + begin, blocks.size() - begin);
  return runs;
}

at::Tensor widened(const at::Tensor& x, at::ScalarType type) {
  const at::Tensor wide = x.scalar_type() == type ? x : x.to(type);
  return wide.stride(2) == 1 || wide.size(2) == 1 ? wide : wide.contiguous();
}

std::int64_t round_up_to(std::int64_t a, std::int64_t to) { return (a + to - 1) / to * to; }

template <class T>
at::TensorOptions options_of() {
  return at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
}

/// Where each block's rows begin in a buffer of one kv head that holds the blocks one after
/// another, each rounded up to whole panels.
struct PackedLayout {
  std::vector<std::int64_t> begin;
  std::int64_t rows = 0;
};

PackedLayout layout_of(std::span<const AttentionBlock> blocks, std::int64_t panel) {
  PackedLayout layout;
  for (const AttentionBlock& block : blocks) {
    layout.begin.push_back(layout.rows);
    layout.rows += round_up_to(block.k_rows, panel);
  }
  return layout;
}

/// Transposed panels of every block and head of x [S, Hkv, D]: [Hkv, layout.rows, D].
template <class T>
at::Tensor packed_panels(const at::Tensor& x, std::span<const AttentionBlock> blocks,
                         const PackedLayout& layout) {
  const KernelTable<T>& kernels = table<T>();
  const std::int64_t head_dim = x.size(2);
  at::Tensor packed = at::empty({x.size(1), layout.rows, head_dim}, options_of<T>());
  T* const to = packed.mutable_data_ptr<T>();
  const T* const from = x.const_data_ptr<T>();
  const auto count = static_cast<std::int64_t>(blocks.size());
  for_tasks<T>(count * x.size(1), 1, [&](std::int64_t task, T*) {
    const std::int64_t head = task / count;
    const AttentionBlock& block = blocks[static_cast<std::size_t>(task % count)];
    kernels.pack_b(
        from + block.k_begin * x.stride(0) + head * x.stride(1), 1, x.stride(0), head_dim,
        block.k_rows,
        to +
            (head * layout.rows + layout.begin[static_cast<std::size_t>(task % count)]) * head_dim);
  });
  return packed;
}

/// x with heads of whole vectors, padded with zeros.
at::Tensor padded_heads(const at::Tensor& x, std::int64_t lanes) {
  const std::int64_t head_dim = x.size(2);
  if (head_dim % lanes == 0) return x;
  at::Tensor padded = at::zeros({x.size(0), x.size(1), round_up_to(head_dim, lanes)}, x.options());
  padded.slice(2, 0, head_dim).copy_(x);
  return padded;
}

struct ForwardPiece {
  std::size_t block;
  std::int64_t head, begin, rows;
  std::int64_t keys;  ///< what the last row sees, the measure of its cost
};

template <class T>
void forward(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& v, const std::vector<AttentionBlock>& blocks,
             const AttentionOptions& options) {
  const KernelTable<T>& kernels = table<T>();
  const PackedLayout layout = layout_of(blocks, kernels.panel);
  const at::Tensor keys = packed_panels<T>(k, blocks, layout);
  const at::Tensor values = padded_heads(v, kernels.lanes);
  const std::int64_t head_dim = q.size(2);
  const std::int64_t v_dim = v.size(2);
  const std::int64_t per_group = q.size(1) / k.size(1);
  const auto* first = blocks.data();
  for (const std::span<const AttentionBlock> run : runs_of(blocks, false)) {
    std::vector<ForwardPiece> pieces;
    for (const AttentionBlock& block : run) {
      for (std::int64_t head = 0; head < q.size(1); ++head) {
        for (std::int64_t row = 0; row < block.q_rows; row += kernels.query_rows) {
          const std::int64_t rows = std::min(kernels.query_rows, block.q_rows - row);
          const std::int64_t seen = block.q_position + row + rows - block.k_position;
          if (seen <= 0) continue;
          pieces.push_back({static_cast<std::size_t>(&block - first), head, row, rows,
                            std::min(seen, block.k_rows)});
        }
      }
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const auto& a, const auto& b) {
      return a.keys * a.rows > b.keys * b.rows;
    });
    for_tasks<T>(static_cast<std::int64_t>(pieces.size()),
                 kernels.attention_scratch(head_dim, v_dim), [&](std::int64_t index, T* scratch) {
                   const ForwardPiece& piece = pieces[static_cast<std::size_t>(index)];
                   const AttentionBlock& block = blocks[piece.block];
                   const std::int64_t group = piece.head / per_group;
                   const std::int64_t row = block.q_begin + piece.begin;
                   AttentionForwardTask<T> task{};
                   task.q = q.const_data_ptr<T>() + row * q.stride(0) + piece.head * q.stride(1);
                   task.q_row = q.stride(0);
                   task.q_rows = piece.rows;
                   task.q_position = block.q_position + piece.begin;
                   task.keys = keys.const_data_ptr<T>() +
                               (group * layout.rows + layout.begin[piece.block]) * head_dim;
                   task.v = values.const_data_ptr<T>() + block.k_begin * values.stride(0) +
                            group * values.stride(1);
                   task.v_row = values.stride(0);
                   task.k_rows = block.k_rows;
                   task.k_position = block.k_position;
                   task.out = accumulator.mutable_data_ptr<T>() + row * accumulator.stride(0) +
                              piece.head * accumulator.stride(1);
                   task.out_row = accumulator.stride(0);
                   task.lse = lse.mutable_data_ptr<T>() + piece.head * lse.stride(0) + row;
                   task.head_dim = head_dim;
                   task.v_dim = v_dim;
                   task.window = options.window;
                   task.scale = options.scale;
                   kernels.attention_forward(task, scratch);
                 });
  }
}

template <class T>
void backward(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
              const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lse,
              const at::Tensor& delta, const std::vector<AttentionBlock>& blocks,
              const AttentionOptions& options) {
  const KernelTable<T>& kernels = table<T>();
  const PackedLayout layout = layout_of(blocks, kernels.panel);
  const at::Tensor keys = packed_panels<T>(k, blocks, layout);
  const at::Tensor values = packed_panels<T>(v, blocks, layout);
  const at::Tensor key_rows = padded_heads(k, kernels.lanes);
  const std::int64_t head_dim = q.size(2);
  const std::int64_t v_dim = v.size(2);
  const std::int64_t groups = k.size(1);
  const std::int64_t per_group = q.size(1) / groups;
  const auto* first = blocks.data();
  for (const std::span<const AttentionBlock> run : runs_of(blocks, true)) {
    std::vector<std::size_t> order;
    for (const AttentionBlock& block : run)
      order.push_back(static_cast<std::size_t>(&block - first));
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return blocks[a].q_rows * blocks[a].k_rows > blocks[b].q_rows * blocks[b].k_rows;
    });
    for_tasks<T>(static_cast<std::int64_t>(order.size()) * groups,
                 kernels.attention_scratch(head_dim, v_dim), [&](std::int64_t index, T* scratch) {
                   const std::size_t at = order[static_cast<std::size_t>(index / groups)];
                   const AttentionBlock& block = blocks[at];
                   const std::int64_t group = index % groups;
                   const std::int64_t head = group * per_group;
                   const auto q_at = [&](const at::Tensor& x) {
                     return block.q_begin * x.stride(0) + head * x.stride(1);
                   };
                   const auto k_at = [&](const at::Tensor& x) {
                     return block.k_begin * x.stride(0) + group * x.stride(1);
                   };
                   const std::int64_t packed_row = group * layout.rows + layout.begin[at];
                   AttentionBackwardTask<T> task{};
                   task.q = q.const_data_ptr<T>() + q_at(q);
                   task.dout = dout.const_data_ptr<T>() + q_at(dout);
                   task.dq = dq.mutable_data_ptr<T>() + q_at(dq);
                   task.lse = lse.const_data_ptr<T>() + head * lse.stride(0) + block.q_begin;
                   task.delta = delta.const_data_ptr<T>() + head * delta.stride(0) + block.q_begin;
                   task.q_row = q.stride(0);
                   task.q_head = q.stride(1);
                   task.dout_row = dout.stride(0);
                   task.dout_head = dout.stride(1);
                   task.dq_row = dq.stride(0);
                   task.dq_head = dq.stride(1);
                   task.lse_head = lse.stride(0);
                   task.delta_head = delta.stride(0);
                   task.heads = per_group;
                   task.q_rows = block.q_rows;
                   task.q_position = block.q_position;
                   task.keys = keys.const_data_ptr<T>() + packed_row * head_dim;
                   task.values = values.const_data_ptr<T>() + packed_row * v_dim;
                   task.k = key_rows.const_data_ptr<T>() + k_at(key_rows);
                   task.k_row = key_rows.stride(0);
                   task.dk = dk.mutable_data_ptr<T>() + k_at(dk);
                   task.dk_row = dk.stride(0);
                   task.dv = dv.mutable_data_ptr<T>() + k_at(dv);
                   task.dv_row = dv.stride(0);
                   task.k_rows = block.k_rows;
                   task.k_position = block.k_position;
                   task.head_dim = head_dim;
                   task.v_dim = v_dim;
                   task.window = options.window;
                   task.scale = options.scale;
                   kernels.attention_backward(task, scratch);
                 });
  }
}

}  // namespace

void attention_forward_(at::Tensor& accumulator, at::Tensor& lse, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v,
                        std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  const std::vector<AttentionBlock> kept = trimmed(blocks, options.window);
  if (kept.empty()) return;
  const at::ScalarType type = lse.scalar_type();
  with_type(type, [&](auto number) {
    forward<decltype(number)>(accumulator, lse, widened(q, type), widened(k, type),
                              widened(v, type), kept, options);
  });
}

void attention_backward_(at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& dout,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& lse, const at::Tensor& delta,
                         std::span<const AttentionBlock> blocks, const AttentionOptions& options) {
  const std::vector<AttentionBlock> kept = trimmed(blocks, options.window);
  if (kept.empty()) return;
  const at::ScalarType type = lse.scalar_type();
  with_type(type, [&](auto number) {
    backward<decltype(number)>(dq, dk, dv, widened(dout, type), widened(q, type), widened(k, type),
                               widened(v, type), lse, delta, kept, options);
  });
}

}  // namespace meshloom::model::kernels
