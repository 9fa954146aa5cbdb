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
  const T* v;     ///< [k_rows, padded head_dim], row stride v_row
  std::int64_t v_row, k_rows, k_position;
  T* out;  ///< [q_rows, head_dim], row stride out_row: running output
  std::int64_t out_row;
  T* lse;  ///< [q_rows], running log-sum-exp
  std::int64_t head_dim, window;
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
  T* dv;
  std::int64_t k_row, dk_row, dv_row, k_rows, k_position;
  std::int64_t head_dim, window;
  double scale;
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
  std::int64_t (*attention_scratch)(std::int64_t head_dim);  ///< elements, for both
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
