#pragma once

#include "model/kernels/kernel_table.h"
#include "model/kernels/simd/gemm.h"

namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

// Queries go in blocks of kTileRows rows, the height of a register tile. Forward keeps kQueryRows
// of them with their running outputs while it walks over kKeyRows keys at a time; backward keeps
// kBackwardKeys keys with their gradients and walks over kBackwardQueries queries at a time.
inline constexpr std::int64_t kQueryRows = 96;
inline constexpr std::int64_t kKeyRows = 256;
inline constexpr std::int64_t kBackwardKeys = 128;
inline constexpr std::int64_t kBackwardQueries = 96;

// Stands for "no key seen yet": finite, so that differences of two are not NaN.
template <class T>
inline constexpr T kNothingSeen = static_cast<T>(-1e30);

template <class T>
inline constexpr std::int64_t kPanelKeys = kTileVectors* kLanes<T>;
// Rows of scores are a line apart from a power of two, or columns would share few cache sets.
template <class T>
inline constexpr std::int64_t kScoreRow = kBackwardKeys + 64 / static_cast<int>(sizeof(T));

inline constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline constexpr std::int64_t round_up(std::int64_t a, std::int64_t to) {
  return (a + to - 1) / to * to;
}

/// Keys [low, high) of a block that the query at `position` sees.
struct Visible {
  std::int64_t low, high;
};
MESHLOOM_INLINE Visible visible(std::int64_t position, std::int64_t k_position, std::int64_t k_rows,
                                std::int64_t window) {
  const std::int64_t high = smaller(larger(position + 1 - k_position, 0), k_rows);
  const std::int64_t low =
      window > 0 ? smaller(larger(position + 1 - window - k_position, 0), high) : 0;
  return {low, high};
}

/// Sets lanes outside [low, high) to `other`; lane 0 of x is number `first`.
template <class T>
MESHLOOM_INLINE Vec<T> keep_range(Vec<T> x, std::int64_t first, Visible range, T other) {
  using Int = typename VecOf<T>::Int;
  const IntVec<T> index = lane_index<T>() + static_cast<Int>(first);
  const IntVec<T> inside =
      (index >= static_cast<Int>(range.low)) & (index < static_cast<Int>(range.high));
  return inside ? x : splat(other);
}

/// out[i * out_row + j] = alpha[i] * out + sum over k of a(i, k) b(k, j) for kTileRows rows and
/// `size` columns (a multiple of the vector); a(i, k) at a[i * a_row + k * a_col].
template <class T, int N>
MESHLOOM_INLINE void accumulate_columns(T* out, std::int64_t out_row, const T* alpha, const T* a,
                                        std::int64_t a_row, std::int64_t a_col, const T* b,
                                        std::int64_t b_row, std::int64_t k_count) {
  Vec<T> acc[kTileRows][N];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      acc[i][j] = load(out + i * out_row + j * kLanes<T>);
      if (alpha != nullptr) acc[i][j] *= alpha[i];
    }
  }
  multiply<T, kTileRows, N>(acc, a, a_row, a_col, b, b_row, k_count);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(out + i * out_row + j * kLanes<T>, acc[i][j]);
  }
}

template <class T>
void accumulate_rows(T* out, std::int64_t out_row, const T* alpha, const T* a, std::int64_t a_row,
                     std::int64_t a_col, const T* b, std::int64_t b_row, std::int64_t k_count,
                     std::int64_t size) {
  constexpr std::int64_t kWide = kTileVectors * kLanes<T>;
  std::int64_t column = 0;
  for (; column + kWide <= size; column += kWide) {
    accumulate_columns<T, kTileVectors>(out + column, out_row, alpha, a, a_row, a_col, b + column,
                                        b_row, k_count);
  }
  if constexpr (kTileVectors == 4) {
    if (column + kWide / 2 <= size) {
      accumulate_columns<T, 2>(out + column, out_row, alpha, a, a_row, a_col, b + column, b_row,
                               k_count);
      column += kWide / 2;
    }
  }
  if (column < size) {
    accumulate_columns<T, 1>(out + column, out_row, alpha, a, a_row, a_col, b + column, b_row,
                             k_count);
  }
}

/// Calls body with the number of vectors that cover `keys` keys of a panel as a constant.
template <class T, class Body>
MESHLOOM_INLINE void with_vectors(std::int64_t keys, const Body& body) {
  if constexpr (kTileVectors == 4) {
    if (keys > 3 * kLanes<T>) return body.template run<4>();
    if (keys > 2 * kLanes<T>) return body.template run<3>();
  }
  if (keys > kLanes<T>) return body.template run<2>();
  return body.template run<1>();
}

/// Copies rows into a contiguous, zero-padded [rows_to, size] block, times a factor.
template <class T>
void copy_rows(T* to, std::int64_t rows_to, std::int64_t size, const T* from, std::int64_t from_row,
               std::int64_t rows, std::int64_t columns, T factor) {
  for (std::int64_t i = 0; i < rows_to; ++i) {
    T* row = to + i * size;
    std::int64_t j = 0;
    if (i < rows) {
      const T* source = from + i * from_row;
      for (; j + kLanes<T> <= columns; j += kLanes<T>) {
        store(row + j, load(source + j) * factor);
      }
      for (; j < columns; ++j) row[j] = source[j] * factor;
    }
    for (; j < size; ++j) row[j] = 0;
  }
}

// ---- Forward -----------------------------------------------------------------------------------

/// Scores of kTileRows queries against up to one panel of keys: stored, and the running maximum.
template <class T>
struct ScorePanel {
  const T* q;
  std::int64_t head_dim;
  const T* panel;
  T* scores;  ///< row stride kKeyRows
  Vec<T>* top;
  std::int64_t first;    ///< number of the panel's first key in the block
  const Visible* range;  ///< [kTileRows]
  bool masked;

  template <int N>
  MESHLOOM_INLINE void run() const {
    Vec<T> acc[kTileRows][N] = {};
    multiply<T, kTileRows, N>(acc, q, head_dim, 1, panel, kPanelKeys<T>, head_dim);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      Vec<T> best = top[i];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        Vec<T> x = acc[i][j];
        if (masked) x = keep_range<T>(x, first + j * kLanes<T>, range[i], kNothingSeen<T>);
        best = max<T>(best, x);
        store(scores + i * kKeyRows + j * kLanes<T>, x);
      }
      top[i] = best;
    }
  }
};

template <class T>
void attention_forward(const AttentionForwardTask<T>& task, T* scratch) {
  const std::int64_t padded = round_up(task.v_dim, kLanes<T>);
  const std::int64_t padded_rows = round_up(task.q_rows, kTileRows);
  T* q = scratch;
  T* out = q + kQueryRows * task.head_dim;
  T* scores = out + kQueryRows * padded;
  T* sums = scores + kTileRows * kKeyRows;  // [kQueryRows, lanes]: summed over lanes at the end
  T* top = sums + kQueryRows * kLanes<T>;   // [kQueryRows], in units of log 2
  copy_rows(q, padded_rows, task.head_dim, task.q, task.q_row, task.q_rows, task.head_dim,
            static_cast<T>(task.scale) * kLog2E<T>);
  for (std::int64_t i = 0; i < padded_rows * padded; ++i) out[i] = 0;
  for (std::int64_t i = 0; i < padded_rows * kLanes<T>; ++i) sums[i] = 0;
  for (std::int64_t i = 0; i < padded_rows; ++i) top[i] = kNothingSeen<T>;

  const Visible first_row = visible(task.q_position, task.k_position, task.k_rows, task.window);
  const Visible last_row =
      visible(task.q_position + task.q_rows - 1, task.k_position, task.k_rows, task.window);
  for (std::int64_t tile = first_row.low / kKeyRows * kKeyRows; tile < last_row.high;
       tile += kKeyRows) {
    for (std::int64_t row = 0; row < task.q_rows; row += kTileRows) {
      Visible range[kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        range[i] = visible(task.q_position + row + i, task.k_position, task.k_rows, task.window);
      }
      // What all rows see and what any row sees; the number of keys grows with the row.
      const std::int64_t begin = larger(range[0].low, tile) / kPanelKeys<T> * kPanelKeys<T>;
      const std::int64_t end = smaller(range[kTileRows - 1].high, tile + kKeyRows);
      if (begin >= end) continue;
      Vec<T> best[kTileRows];
      for (int i = 0; i < kTileRows; ++i) best[i] = splat(kNothingSeen<T>);
      for (std::int64_t key = begin; key < end; key += kPanelKeys<T>) {
        const std::int64_t count = smaller(end - key, kPanelKeys<T>);
        const bool masked =
            key < range[kTileRows - 1].low || key + round_up(count, kLanes<T>) > range[0].high;
        with_vectors<T>(count, ScorePanel<T>{q + row * task.head_dim, task.head_dim,
                                             task.keys + key * task.head_dim,
                                             scores + (key - begin), best, key, range, masked});
      }
      T alpha[kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        const T before = top[row + i];
        const T now = max_lanes<T>(best[i]);
        top[row + i] = before > now ? before : now;  // NaN stays
        alpha[i] = before - top[row + i];
      }
      {
        T full[round_up(kTileRows, kLanes<T>)] = {};
        for (int i = 0; i < kTileRows; ++i) full[i] = alpha[i];
        for (int i = 0; i < kTileRows; i += kLanes<T>) store(full + i, exp2<T>(load(full + i)));
        for (int i = 0; i < kTileRows; ++i) alpha[i] = full[i];
      }
      const std::int64_t width = round_up(end - begin, kLanes<T>);
      const bool masked = begin < range[kTileRows - 1].low || begin + width > range[0].high;
      for (int i = 0; i < kTileRows; ++i) {
        T* line = scores + i * kKeyRows;
        const Vec<T> shift = splat(top[row + i]);
        Vec<T> sum = load(sums + (row + i) * kLanes<T>) * alpha[i];
        if (masked) {
          for (std::int64_t key = 0; key < width; key += kLanes<T>) {
            const Vec<T> p = keep_range<T>(exp2<T>(load(line + key) - shift), begin + key, range[i],
                                           static_cast<T>(0));
            store(line + key, p);
            sum += p;
          }
        } else {
          Vec<T> other{};
          std::int64_t key = 0;
          for (; key + 2 * kLanes<T> <= width; key += 2 * kLanes<T>) {
            const Vec<T> p0 = exp2<T>(load(line + key) - shift);
            const Vec<T> p1 = exp2<T>(load(line + key + kLanes<T>) - shift);
            store(line + key, p0);
            store(line + key + kLanes<T>, p1);
            sum += p0;
            other += p1;
          }
          for (; key < width; key += kLanes<T>) {
            const Vec<T> p = exp2<T>(load(line + key) - shift);
            store(line + key, p);
            sum += p;
          }
          sum += other;
        }
        store(sums + (row + i) * kLanes<T>, sum);
      }
      accumulate_rows<T>(out + row * padded, padded, alpha, scores, kKeyRows, 1,
                         task.v + begin * task.v_row, task.v_row, end - begin, padded);
    }
  }

  for (std::int64_t i = 0; i < task.q_rows; ++i) {
    if (top[i] <= kNothingSeen<T>) continue;
    constexpr T kLn2 = static_cast<T>(0.6931471805599453);
    const T sum = sum_lanes<T>(load(sums + i * kLanes<T>));
    const T log_sum = static_cast<T>(__builtin_log(static_cast<double>(sum)));
    const T lse = top[i] * kLn2 + log_sum;
    const T before = task.lse[i];
    T* to = task.out + i * task.out_row;
    const T* from = out + i * padded;
    if (before == -__builtin_inf()) {
      const T inverse = static_cast<T>(1) / sum;
      std::int64_t j = 0;
      for (; j + kLanes<T> <= task.v_dim; j += kLanes<T>) {
        store(to + j, load(from + j) * inverse);
      }
      for (; j < task.v_dim; ++j) to[j] = from[j] * inverse;
      task.lse[i] = lse;
      continue;
    }
    // Merge with what earlier blocks left.
    const double high = static_cast<double>(lse > before ? lse : before);
    const double old_part = __builtin_exp(static_cast<double>(before) - high);
    const double new_part = __builtin_exp(static_cast<double>(lse) - high);
    const double total = old_part + new_part;
    const T keep = static_cast<T>(old_part / total);
    const T take = static_cast<T>(new_part / total / static_cast<double>(sum));
    for (std::int64_t j = 0; j < task.v_dim; ++j) to[j] = to[j] * keep + from[j] * take;
    task.lse[i] = static_cast<T>(high + __builtin_log(total));
  }
}

// ---- Backward ----------------------------------------------------------------------------------

/// Probabilities of kTileRows queries over up to one panel of keys, and the gradient of their
/// scores.
template <class T>
struct GradientPanel {
  const T* q;  ///< times scale * log2(e)
  const T* dout;
  std::int64_t head_dim, padded, v_dim, padded_v;
  const T* key_panel;
  const T* value_panel;
  T* p;  ///< row stride kScoreRow
  T* ds;
  const T* lse;    ///< [kTileRows], in units of log 2
  const T* delta;  ///< [kTileRows]
  std::int64_t first;
  const Visible* range;
  bool masked;

  template <int N>
  MESHLOOM_INLINE void run() const {
    {
      Vec<T> acc[kTileRows][N] = {};
      multiply<T, kTileRows, N>(acc, q, padded, 1, key_panel, kPanelKeys<T>, head_dim);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          Vec<T> x = exp2<T>(acc[i][j] - lse[i]);
          if (masked) {
            x = keep_range<T>(x, first + j * kLanes<T>, range[i], static_cast<T>(0));
          }
          store(p + i * kScoreRow<T> + j * kLanes<T>, x);
        }
      }
    }
    Vec<T> acc[kTileRows][N] = {};
    multiply<T, kTileRows, N>(acc, dout, padded_v, 1, value_panel, kPanelKeys<T>, v_dim);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const std::int64_t at = i * kScoreRow<T> + j * kLanes<T>;
        store(ds + at, load(p + at) * (acc[i][j] - delta[i]));
      }
    }
  }
};

template <class T>
void add_rows(T* to, std::int64_t to_row, const T* from, std::int64_t from_row, std::int64_t rows,
              std::int64_t columns, T factor) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T* target = to + i * to_row;
    const T* source = from + i * from_row;
    std::int64_t j = 0;
    for (; j + kLanes<T> <= columns; j += kLanes<T>) {
      store(target + j, load(target + j) + load(source + j) * factor);
    }
    for (; j < columns; ++j) target[j] += source[j] * factor;
  }
}

template <class T>
void attention_backward(const AttentionBackwardTask<T>& task, T* scratch) {
  constexpr T kLn2 = static_cast<T>(0.6931471805599453);
  const std::int64_t padded = round_up(task.head_dim, kLanes<T>);
  const std::int64_t padded_v = round_up(task.v_dim, kLanes<T>);
  constexpr std::int64_t kKeysUp = round_up(kBackwardKeys, kTileRows);
  T* q = scratch;
  T* dout = q + kBackwardQueries * padded;
  T* dq = dout + kBackwardQueries * padded_v;
  T* dk = dq + kBackwardQueries * padded;
  T* dv = dk + kKeysUp * padded;
  T* lse = dv + kKeysUp * padded_v;
  T* delta = lse + kBackwardQueries;
  T* p = delta + kBackwardQueries;  // [kBackwardQueries, kScoreRow]
  T* ds = p + kBackwardQueries * kScoreRow<T> + kTileRows;

  for (std::int64_t tile = 0; tile < task.k_rows; tile += kBackwardKeys) {
    const std::int64_t keys = smaller(kBackwardKeys, task.k_rows - tile);
    // Queries that see any of these keys.
    const std::int64_t first_key = task.k_position + tile;
    const std::int64_t q_low = smaller(larger(first_key - task.q_position, 0), task.q_rows);
    const std::int64_t q_high =
        task.window > 0
            ? smaller(task.q_rows, larger(first_key + keys - 1 + task.window - task.q_position, 0))
            : task.q_rows;
    if (q_low >= q_high) continue;
    for (std::int64_t i = 0; i < kKeysUp * padded; ++i) dk[i] = 0;
    for (std::int64_t i = 0; i < kKeysUp * padded_v; ++i) dv[i] = 0;
    for (std::int64_t head = 0; head < task.heads; ++head) {
      for (std::int64_t start = q_low; start < q_high; start += kBackwardQueries) {
        const std::int64_t rows = smaller(kBackwardQueries, q_high - start);
        const std::int64_t rows_up = round_up(rows, kTileRows);
        copy_rows(q, rows_up, padded, task.q + head * task.q_head + start * task.q_row, task.q_row,
                  rows, task.head_dim, static_cast<T>(task.scale) * kLog2E<T>);
        copy_rows(dout, rows_up, padded_v,
                  task.dout + head * task.dout_head + start * task.dout_row, task.dout_row, rows,
                  task.v_dim, static_cast<T>(1));
        for (std::int64_t i = 0; i < rows_up; ++i) {
          const std::int64_t at = start + (i < rows ? i : 0);
          // A row that saw nothing sees nothing here either: any finite number will do.
          const T natural = task.lse[head * task.lse_head + at];
          lse[i] = natural == -__builtin_inf() ? static_cast<T>(0) : natural * kLog2E<T>;
          delta[i] = task.delta[head * task.delta_head + at];
        }
        for (std::int64_t i = 0; i < rows_up * padded; ++i) dq[i] = 0;
        const std::int64_t position = task.q_position + start;
        for (std::int64_t row = 0; row < rows; row += kTileRows) {
          Visible range[kTileRows];
          for (int i = 0; i < kTileRows; ++i) {
            range[i] = visible(position + row + i, first_key, keys, task.window);
          }
          const std::int64_t begin = range[0].low / kPanelKeys<T> * kPanelKeys<T>;
          const std::int64_t end = range[kTileRows - 1].high;
          if (begin >= end) continue;
          for (std::int64_t key = begin; key < end; key += kPanelKeys<T>) {
            const std::int64_t count = smaller(end - key, kPanelKeys<T>);
            const bool masked =
                key < range[kTileRows - 1].low || key + round_up(count, kLanes<T>) > range[0].high;
            with_vectors<T>(
                count,
                GradientPanel<T>{q + row * padded, dout + row * padded_v, task.head_dim, padded,
                                 task.v_dim, padded_v, task.keys + (tile + key) * task.head_dim,
                                 task.values + (tile + key) * task.v_dim,
                                 p + row * kScoreRow<T> + key, ds + row * kScoreRow<T> + key,
                                 lse + row, delta + row, key, range, masked});
          }
          // Key blocks of the products below may reach over the ends of what was computed.
          constexpr std::int64_t kReach = round_up(kTileRows, kLanes<T>);
          const std::int64_t after = begin + round_up(end - begin, kLanes<T>);
          for (std::int64_t i = row; i < row + kTileRows; ++i) {
            for (std::int64_t key = larger(begin - kReach, 0); key < begin; ++key) {
              p[i * kScoreRow<T> + key] = ds[i * kScoreRow<T> + key] = 0;
            }
            for (std::int64_t key = after; key < smaller(after + kReach, kScoreRow<T>); ++key) {
              p[i * kScoreRow<T> + key] = ds[i * kScoreRow<T> + key] = 0;
            }
          }
          accumulate_rows<T>(dq + row * padded, padded, nullptr, ds + row * kScoreRow<T> + begin,
                             kScoreRow<T>, 1, task.k + (tile + begin) * task.k_row, task.k_row,
                             end - begin, padded);
        }
        for (std::int64_t key = 0; key < keys; key += kTileRows) {
          const std::int64_t low = smaller(larger(first_key + key - position, 0), rows);
          const std::int64_t last_key = first_key + smaller(key + kTileRows, keys) - 1;
          const std::int64_t high =
              task.window > 0 ? smaller(rows, larger(last_key + task.window - position, 0)) : rows;
          if (low >= high) continue;
          accumulate_rows<T>(dv + key * padded_v, padded_v, nullptr, p + low * kScoreRow<T> + key,
                             1, kScoreRow<T>, dout + low * padded_v, padded_v, high - low,
                             padded_v);
          accumulate_rows<T>(dk + key * padded, padded, nullptr, ds + low * kScoreRow<T> + key, 1,
                             kScoreRow<T>, q + low * padded, padded, high - low, padded);
        }
        add_rows(task.dq + head * task.dq_head + start * task.dq_row, task.dq_row, dq, padded, rows,
                 task.head_dim, static_cast<T>(task.scale));
      }
    }
    add_rows(task.dk + tile * task.dk_row, task.dk_row, dk, padded, keys, task.head_dim, kLn2);
    add_rows(task.dv + tile * task.dv_row, task.dv_row, dv, padded_v, keys, task.v_dim,
             static_cast<T>(1));
  }
}

template <class T>
std::int64_t attention_scratch(std::int64_t head_dim, std::int64_t v_dim) {
  const std::int64_t padded = round_up(head_dim, kLanes<T>);
  const std::int64_t padded_v = round_up(v_dim, kLanes<T>);
  const std::int64_t forward =
      kQueryRows * (padded + padded_v + kLanes<T> + 1) + kTileRows * kKeyRows;
  const std::int64_t backward = padded * (2 * kBackwardQueries + kBackwardKeys + kTileRows) +
                                padded_v * (kBackwardQueries + kBackwardKeys + kTileRows) +
                                2 * kBackwardQueries * (kScoreRow<T> + 1) + 2 * kTileRows;
  return round_up(larger(forward, backward), 64);
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
