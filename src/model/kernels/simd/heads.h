#pragma once

#include "model/kernels/kernel_table.h"
#include "model/kernels/simd/rows.h"

// What happens to query and key heads between the projection and attention, and the dot products
// of attention's backward.
namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

/// Rotates pairs (i, i + half); what is not rotated is copied unless it is there already.
template <class T, bool Back>
MESHLOOM_INLINE void rotate(T* to, const T* from, const T* cos, const T* sin, std::int64_t half,
                            std::int64_t head_dim) {
  for_vectors<T>(half, [&](std::int64_t j, auto part) {
    const Vec<T> low = load<T>(from + j, part);
    const Vec<T> high = load<T>(from + half + j, part);
    const Vec<T> c = load<T>(cos + j, part);
    const Vec<T> s = Back ? -load<T>(sin + j, part) : load<T>(sin + j, part);
    store<T>(to + j, low * c - high * s, part);
    store<T>(to + half + j, high * c + low * s, part);
  });
  if (from == to) return;
  for (std::int64_t j = 2 * half; j < head_dim; ++j) to[j] = from[j];
}

/// Rotates pairs (2i, 2i + 1) in place.
template <class T, bool Back>
MESHLOOM_INLINE void rotate_neighbours(T* x, const T* cos, const T* sin, std::int64_t half) {
  for (std::int64_t j = 0; j < half; ++j) {
    const T even = x[2 * j];
    const T odd = x[2 * j + 1];
    const T s = Back ? -sin[j] : sin[j];
    x[2 * j] = even * cos[j] - odd * s;
    x[2 * j + 1] = odd * cos[j] + even * s;
  }
}

template <class T>
MESHLOOM_INLINE T head_rstd(const T* x, std::int64_t head_dim, double eps) {
  Vec<T> squares{};
  for_vectors<T>(head_dim, [&](std::int64_t j, auto part) {
    const Vec<T> value = load<T>(x + j, part);
    squares += value * value;
  });
  return inverse_rms<T>(sum_lanes<T>(squares), head_dim, eps);
}

template <class T>
void heads(const HeadsTask<T>& task) {
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    const T* cos = task.cos + t * task.half;
    const T* sin = task.sin + t * task.half;
    for (std::int64_t h = 0; h < task.heads; ++h) {
      const T* from = task.from + t * task.from_row + h * task.from_head;
      T* to = task.to + t * task.to_row + h * task.to_head;
      if (task.interleaved) {
        rotate_neighbours<T, false>(to, cos, sin, task.half);
        continue;
      }
      if (task.weight != nullptr) {
        const T rstd = head_rstd<T>(from, task.head_dim, task.eps);
        for_vectors<T>(task.head_dim, [&](std::int64_t j, auto part) {
          store<T>(to + j, load<T>(task.weight + j, part) * (load<T>(from + j, part) * rstd), part);
        });
        from = to;
      }
      rotate<T, false>(to, from, cos, sin, task.half, task.head_dim);
    }
  }
}

template <class T>
void heads_backward(const HeadsTask<T>& task) {
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    const T* cos = task.cos + t * task.half;
    const T* sin = task.sin + t * task.half;
    for (std::int64_t h = 0; h < task.heads; ++h) {
      T* to = task.to + t * task.to_row + h * task.to_head;
      if (task.interleaved) {
        rotate_neighbours<T, true>(to, cos, sin, task.half);
        continue;
      }
      rotate<T, true>(to, task.from + t * task.from_row + h * task.from_head, cos, sin, task.half,
                      task.head_dim);
      if (task.weight == nullptr) continue;
      const T* x = task.x + t * task.x_row + h * task.x_head;
      const T rstd = head_rstd<T>(x, task.head_dim, task.eps);
      Vec<T> products{};
      for_vectors<T>(task.head_dim, [&](std::int64_t j, auto part) {
        const Vec<T> gradient = load<T>(to + j, part);
        const Vec<T> normed = load<T>(x + j, part) * rstd;
        products += gradient * load<T>(task.weight + j, part) * normed;
        store<T>(task.dweight + j, load<T>(task.dweight + j, part) + gradient * normed, part);
      });
      const T mean = sum_lanes<T>(products) / static_cast<T>(task.head_dim);
      for_vectors<T>(task.head_dim, [&](std::int64_t j, auto part) {
        const Vec<T> dnormed = load<T>(to + j, part) * load<T>(task.weight + j, part);
        const Vec<T> normed = load<T>(x + j, part) * rstd;
        store<T>(to + j, (dnormed - normed * mean) * rstd, part);
      });
    }
  }
}

template <class T>
void attention_delta(const DeltaTask<T>& task) {
  for (std::int64_t h = 0; h < task.heads; ++h) {
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const T* dout = task.dout + t * task.dout_row + h * task.dout_head;
      const T* out = task.out + t * task.out_row + h * task.out_head;
      Vec<T> products{};
      for_vectors<T>(task.head_dim, [&](std::int64_t j, auto part) {
        products += load<T>(dout + j, part) * load<T>(out + j, part);
      });
      task.delta[h * task.delta_head + t] = sum_lanes<T>(products);
    }
  }
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
