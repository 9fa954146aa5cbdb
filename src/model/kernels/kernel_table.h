#pragma once

#include <cstdint>

namespace meshloom::model::kernels {

/// One tile product: C (+)= A B (+ bias), on packed B. Pointers and strides in elements.
template <class T>
struct ProductTask {
  const T* a;  ///< element (m, k) at a[m * a_row + k * a_col]
  std::int64_t a_row, a_col;
  const T* b;  ///< packed by pack_b
  T* c;        ///< [m, n], row stride c_row
  std::int64_t c_row;
  std::int64_t m, n, k;
  bool accumulate;
  const T* bias;  ///< [n] or null; added where not accumulating
};

/// Forward attention of some query rows of one head over the keys of one block.
template <class T>
struct AttentionForwardTask {
  const T* q;  ///< [q_rows, head_dim], row stride q_row
  std::int64_t q_row, q_rows, q_position;
  const T* keys;  ///< packed by pack_b from K^T: [head_dim, k_rows]
  const T* v;     ///< [k_rows, padded v_dim], row stride v_row
  std::int64_t v_row, k_rows, k_position;
  T* out;  ///< [q_rows, v_dim], row stride out_row: running output
  std::int64_t out_row;
  T* lse;  ///< [q_rows], running log-sum-exp
  std::int64_t head_dim, v_dim, window;
  double scale;
};

/// Backward attention of one block and one kv head with all its query heads.
template <class T>
struct AttentionBackwardTask {
  const T* q;      ///< head h, row i at q + h * q_head + i * q_row
  const T* dout;   ///< likewise
  T* dq;           ///< likewise; added to
  const T* lse;    ///< head h, row i at lse + h * lse_head + i
  const T* delta;  ///< at delta + h * delta_head + i
  std::int64_t q_row, q_head, dout_row, dout_head, dq_row, dq_head, lse_head, delta_head, heads;
  std::int64_t q_rows, q_position;
  const T* keys;    ///< packed by pack_b from K^T
  const T* values;  ///< packed by pack_b from V^T
  const T* k;       ///< [k_rows, padded head_dim], row stride k_row
  T* dk;            ///< [k_rows, head_dim], row stride dk_row; added to
  T* dv;            ///< [k_rows, v_dim], row stride dv_row; added to
  std::int64_t k_row, dk_row, dv_row, k_rows, k_position;
  std::int64_t head_dim, v_dim, window;
  double scale;
};

/// RMS norm of rows, or of the sum with a residual. Rows are `size` numbers, `rows` of them.
template <class T>
struct NormTask {
  const T* x;
  const T* residual;  ///< or null
  T* sum;             ///< x + residual goes here, may be x; null without a residual
  const T* weight;    ///< [size]
  T* y;               ///< contiguous
  T* rstd;            ///< [rows]
  std::int64_t x_row, residual_row, rows, size;
  double eps;
};

template <class T>
struct NormBackwardTask {
  T* dx;  ///< added to
  const T* dy;
  const T* x;
  const T* weight;
  const T* rstd;  ///< [rows]
  T* dweight;     ///< [size], added to
  std::int64_t dx_row, dy_row, x_row, rows, size;
};

/// Heads of some tokens: head h of token t is at pointer + t * row + h * head. Forward norms (where
/// there is a weight) and rotates; backward rotates back and goes through the norm.
template <class T>
struct HeadsTask {
  const T* from;
  T* to;            ///< may be `from` where there is no norm
  const T* x;       ///< backward through a norm: what forward had as `from`
  const T* weight;  ///< [head_dim], or null: no norm
  T* dweight;       ///< [head_dim], added to by a backward through a norm
  const T* cos;     ///< [tokens, half], contiguous
  const T* sin;
  std::int64_t from_row, from_head, to_row, to_head, x_row, x_head;
  std::int64_t tokens, heads, head_dim, half;
  double eps;
  bool interleaved;  ///< pairs are (2i, 2i + 1), in place and without a norm
};

/// silu(gate) * up of rows of 2 * size numbers.
template <class T>
struct SwigluTask {
  const T* gate_up;
  T* out;  ///< contiguous
  std::int64_t gate_up_row, rows, size;
};

/// In place: gate_up becomes its gradient, dy the activation.
template <class T>
struct SwigluBackwardTask {
  T* dy;
  T* gate_up;
  const T* weights;  ///< [rows] that scale the activation, or null
  T* dweights;       ///< [rows], where there are weights
  std::int64_t dy_row, gate_up_row, rows, size;
};

/// Scores of rows of `experts` logits and the best k. Outputs are contiguous.
template <class T>
struct RouteTask {
  const T* logits;
  const T* bias;  ///< [experts], added for the choice alone, or null
  T* probabilities;
  T* weights;
  std::int64_t* chosen;
  T* lse;
  std::int64_t logits_row, rows, experts, k, groups, top_groups;
  double scale;
  bool normalize, softmax;
};

/// One row of `extra` (or null) is added to the gradient of every row of normalised probabilities.
template <class T>
struct RouteBackwardTask {
  const T* dweights;
  const T* probabilities;
  const T* weights;
  const std::int64_t* chosen;
  const T* lse;
  const T* extra;
  T* dlogits;
  std::int64_t dweights_row, rows, experts, k;
  double scale, z_weight;
  bool normalize, softmax;
};

/// out[t] = sum over j < k of (weights[t, j] *) from[row[t * k + j]]; negative rows count as zero.
template <class T>
struct CombineTask {
  const T* from;
  const std::int64_t* row;
  const T* weights;  ///< or null: ones
  T* out;            ///< contiguous
  std::int64_t from_row, weights_row, tokens, k, size;
};

/// Cross-entropy of rows of logits; with a scale they become scale * (softmax - one-hot).
template <class T>
struct CrossEntropyTask {
  T* logits;
  const std::int64_t* labels;
  double* losses;  ///< [rows]
  std::int64_t logits_row, rows, vocabulary;
  double scale;
};

/// delta[h * delta_head + t] = dout . out of head h of token t.
template <class T>
struct DeltaTask {
  const T* dout;
  const T* out;
  T* delta;
  std::int64_t dout_row, dout_head, out_row, out_head, delta_head, tokens, heads, head_dim;
};

/// The vector kernels of one instruction set and one type. Each works on a range that the caller
/// gives it, on one thread.
template <class T>
struct KernelTable {
  std::int64_t panel;  ///< columns of a panel of packed B
  /// Packs B [k, n] (element (k, n) at b[k * row + n * col]) into panels: ceil(n / panel) * panel *
  /// k elements.
  void (*pack_b)(const T* b, std::int64_t row, std::int64_t col, std::int64_t k, std::int64_t n,
                 T* packed);
  void (*product)(const ProductTask<T>& task, T* scratch);
  std::int64_t product_scratch;  ///< elements for k rows: product_scratch * k

  std::int64_t lanes;       ///< numbers in a vector: what padded head sizes are multiples of
  std::int64_t query_rows;  ///< most query rows of a forward task
  void (*attention_forward)(const AttentionForwardTask<T>& task, T* scratch);
  void (*attention_backward)(const AttentionBackwardTask<T>& task, T* scratch);
  /// Elements, for both.
  std::int64_t (*attention_scratch)(std::int64_t head_dim, std::int64_t v_dim);
  void (*attention_delta)(const DeltaTask<T>& task);

  void (*norm)(const NormTask<T>& task);
  void (*norm_backward)(const NormBackwardTask<T>& task);
  void (*heads)(const HeadsTask<T>& task);
  void (*heads_backward)(const HeadsTask<T>& task);
  void (*swiglu)(const SwigluTask<T>& task);
  void (*swiglu_backward)(const SwigluBackwardTask<T>& task);
  /// @param scratch  [experts + 2 groups + k] @param group_scratch  [top_groups].
  void (*route)(const RouteTask<T>& task, T* scratch, std::int64_t* group_scratch);
  void (*route_backward)(const RouteBackwardTask<T>& task);
  void (*combine)(const CombineTask<T>& task);
  void (*cross_entropy)(const CrossEntropyTask<T>& task);
  void (*add)(T* to, const T* from, std::int64_t count);  ///< to += from
};

namespace level_baseline {
extern const KernelTable<float> kTable32;
extern const KernelTable<double> kTable64;
}  // namespace level_baseline
namespace level_avx2 {
extern const KernelTable<float> kTable32;
extern const KernelTable<double> kTable64;
}  // namespace level_avx2
namespace level_avx512 {
extern const KernelTable<float> kTable32;
extern const KernelTable<double> kTable64;
}  // namespace level_avx512

}  // namespace meshloom::model::kernels
