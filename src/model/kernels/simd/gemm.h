#pragma once

#include "model/kernels/kernel_table.h"
#include "model/kernels/simd/vec.h"

namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

// Rows and vectors of a register tile: 6 x 4 of 32 registers, or 6 x 2 of 16.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
// Tiles of a transposed A that are packed together: few enough to write them side by side.
inline constexpr int kPackedTiles = 8;

/// acc[i][j] += sum over k of a(i, k) * b(k, j): a(i, k) = a[i * a_row + k * a_col], row k of b at
/// b + k * b_row.
template <class T, int M, int N>
MESHLOOM_INLINE void multiply(Vec<T> (&acc)[M][N], const T* a, std::int64_t a_row,
                              std::int64_t a_col, const T* b, std::int64_t b_row,
                              std::int64_t k_count) {
  // Two pointers, three rows each: strides of more rows would not fit the integer registers.
  constexpr int kHalf = 3;
  const T* low = a;
  const T* high = M > kHalf ? a + kHalf * a_row : a;
  for (std::int64_t k = 0; k < k_count; ++k) {
    Vec<T> bv[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) bv[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<T> av = splat(i < kHalf ? low[i * a_row] : high[(i - kHalf) * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] += av * bv[j];
    }
    low += a_col;
    high += a_col;
    b += b_row;
  }
}

/// One register tile of a product; `columns` of the last vectors are real.
template <class T, int M, int N>
void product_tile(const ProductTask<T>& task, const T* a, std::int64_t a_row, std::int64_t a_col,
                  const T* b, std::int64_t b_row, T* c, const T* bias, std::int64_t columns) {
  Vec<T> acc[M][N] = {};
  if (a_col == 1) {
    multiply<T, M, N>(acc, a, a_row, 1, b, b_row, task.k);
  } else {
    multiply<T, M, N>(acc, a, 1, kTileRows, b, b_row, task.k);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      T* out = c + i * task.c_row + j * kLanes<T>;
      const std::int64_t left = columns - j * kLanes<T>;
      if (left >= kLanes<T>) {
        Vec<T> value = acc[i][j];
        if (task.accumulate) value += load(out);
        if (bias != nullptr) value += load(bias + j * kLanes<T>);
        store(out, value);
      } else if (left > 0) {
        Vec<T> value = acc[i][j];
        if (task.accumulate) value += load_part(out, left);
        if (bias != nullptr) value += load_part(bias + j * kLanes<T>, left);
        store_part(out, value, left);
      }
    }
  }
}

template <class T, int N>
void product_rows(const ProductTask<T>& task, std::int64_t rows, const T* a, std::int64_t a_row,
                  std::int64_t a_col, const T* b, std::int64_t b_row, T* c, const T* bias,
                  std::int64_t columns) {
  switch (rows) {
    case 1:
      return product_tile<T, 1, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
    case 2:
      return product_tile<T, 2, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
    case 3:
      return product_tile<T, 3, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
    case 4:
      return product_tile<T, 4, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
    case 5:
      return product_tile<T, 5, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
    default:
      return product_tile<T, 6, N>(task, a, a_row, a_col, b, b_row, c, bias, columns);
  }
}

/// Copies kPackedTiles tiles of rows of a transposed A, so that a tile's column is contiguous.
template <class T>
void pack_a(const ProductTask<T>& task, const T* a, std::int64_t rows, T* packed) {
  constexpr std::int64_t kAhead = 12;
  for (std::int64_t k = 0; k < task.k; ++k) {
    const T* from = a + k * task.a_col;
    T* to = packed + k * kTileRows;
    if (task.a_row == 1 && k + kAhead < task.k) {  // rows are too far apart for the hardware's own
      for (std::int64_t i = 0; i < rows; i += 64 / static_cast<int>(sizeof(T))) {
        __builtin_prefetch(from + kAhead * task.a_col + i);
      }
    }
    for (std::int64_t i = 0; i < rows; i += kTileRows, to += task.k * kTileRows) {
      if (task.a_row == 1 && rows - i >= kTileRows) {
        __builtin_memcpy(to, from + i, kTileRows * sizeof(T));
        continue;
      }
      for (std::int64_t r = i; r < i + kTileRows && r < rows; ++r) to[r - i] = from[r * task.a_row];
    }
  }
}

template <class T>
void product(const ProductTask<T>& task, T* scratch) {
  constexpr int kPanel = kTileVectors * kLanes<T>;
  const bool packs = task.a_col != 1;
  for (std::int64_t m = 0; m < task.m; m += kTileRows) {
    const std::int64_t rows = task.m - m < kTileRows ? task.m - m : kTileRows;
    const T* a = task.a + m * task.a_row;
    if (packs) {
      constexpr std::int64_t kGroup = kPackedTiles * kTileRows;
      if (m % kGroup == 0) pack_a(task, a, task.m - m < kGroup ? task.m - m : kGroup, scratch);
      a = scratch + m % kGroup * task.k;
    }
    for (std::int64_t n = 0; n < task.n; n += kPanel) {
      const T* b = task.b + n * task.k;
      T* c = task.c + m * task.c_row + n;
      const T* bias = task.bias == nullptr ? nullptr : task.bias + n;
      const std::int64_t columns = task.n - n < kPanel ? task.n - n : kPanel;
      if constexpr (kTileVectors == 4) {
        if (columns <= kLanes<T>) {
          product_rows<T, 1>(task, rows, a, task.a_row, task.a_col, b, kPanel, c, bias, columns);
          continue;
        }
      }
      if (columns <= kPanel / 2) {
        product_rows<T, kTileVectors / 2>(task, rows, a, task.a_row, task.a_col, b, kPanel, c, bias,
                                          columns);
      } else {
        product_rows<T, kTileVectors>(task, rows, a, task.a_row, task.a_col, b, kPanel, c, bias,
                                      columns);
      }
    }
  }
}

template <class T>
void pack_b(const T* b, std::int64_t row, std::int64_t col, std::int64_t k_count, std::int64_t n,
            T* packed) {
  constexpr int kPanel = kTileVectors * kLanes<T>;
  for (std::int64_t first = 0; first < n; first += kPanel) {
    const std::int64_t columns = n - first < kPanel ? n - first : kPanel;
    T* to = packed + first * k_count;
    const T* from = b + first * col;
    if (col == 1) {
      for (std::int64_t k = 0; k < k_count; ++k) {
        if (columns == kPanel) {
          for (int j = 0; j < kTileVectors; ++j) {
            store(to + k * kPanel + j * kLanes<T>, load(from + k * row + j * kLanes<T>));
          }
          continue;
        }
        for (std::int64_t j = 0; j < columns; ++j) to[k * kPanel + j] = from[k * row + j];
        for (std::int64_t j = columns; j < kPanel; ++j) to[k * kPanel + j] = 0;
      }
    } else {
      for (std::int64_t j = 0; j < columns; ++j) {
        for (std::int64_t k = 0; k < k_count; ++k) to[k * kPanel + j] = from[k * row + j * col];
      }
      for (std::int64_t j = columns; j < kPanel; ++j) {
        for (std::int64_t k = 0; k < k_count; ++k) to[k * kPanel + j] = 0;
      }
    }
  }
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
