#pragma once

#include "model/kernels/kernel_table.h"
#include "model/kernels/simd/vec.h"

// Passes over rows of numbers: norms, SwiGLU, combination, cross-entropy. Every row is read and
// written once or twice while it is in the nearest cache.
namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

template <class T>
void add(T* to, const T* from, std::int64_t count) {
  for_vectors<T>(count, [&](std::int64_t j, auto part) {
    store<T>(to + j, load<T>(to + j, part) + load<T>(from + j, part), part);
  });
}

template <class T>
MESHLOOM_INLINE T square_root(T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

/// 1 / sqrt(mean square + eps).
template <class T>
MESHLOOM_INLINE T inverse_rms(T sum_of_squares, std::int64_t size, double eps) {
  return 1 / square_root<T>(sum_of_squares / static_cast<T>(size) + static_cast<T>(eps));
}

template <class T>
void norm(const NormTask<T>& task) {
  for (std::int64_t i = 0; i < task.rows; ++i) {
    const T* x = task.x + i * task.x_row;
    Vec<T> squares{};
    if (task.residual != nullptr) {
      const T* residual = task.residual + i * task.residual_row;
      T* sum = task.sum + i * task.x_row;
      for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
        const Vec<T> value = load<T>(x + j, part) + load<T>(residual + j, part);
        squares += value * value;
        store<T>(sum + j, value, part);
      });
      x = sum;
    } else {
      for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
        const Vec<T> value = load<T>(x + j, part);
        squares += value * value;
      });
    }
    const T rstd = inverse_rms<T>(sum_lanes<T>(squares), task.size, task.eps);
    task.rstd[i] = rstd;
    T* y = task.y + i * task.size;
    for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
      store<T>(y + j, load<T>(task.weight + j, part) * (load<T>(x + j, part) * rstd), part);
    });
  }
}

template <class T>
void norm_backward(const NormBackwardTask<T>& task) {
  for (std::int64_t i = 0; i < task.rows; ++i) {
    const T* x = task.x + i * task.x_row;
    const T* dy = task.dy + i * task.dy_row;
    T* dx = task.dx + i * task.dx_row;
    const T rstd = task.rstd[i];
    Vec<T> products{};
    for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
      const Vec<T> normed = load<T>(x + j, part) * rstd;
      const Vec<T> gradient = load<T>(dy + j, part);
      products += gradient * load<T>(task.weight + j, part) * normed;
      store<T>(task.dweight + j, load<T>(task.dweight + j, part) + gradient * normed, part);
    });
    const T mean = sum_lanes<T>(products) / static_cast<T>(task.size);
    for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
      const Vec<T> normed = load<T>(x + j, part) * rstd;
      const Vec<T> dnormed = load<T>(dy + j, part) * load<T>(task.weight + j, part);
      store<T>(dx + j, load<T>(dx + j, part) + (dnormed - normed * mean) * rstd, part);
    });
  }
}

template <class T>
MESHLOOM_INLINE Vec<T> sigmoid(Vec<T> x) {
  return static_cast<T>(1) / (static_cast<T>(1) + exp<T>(-x));
}

template <class T>
void swiglu(const SwigluTask<T>& task) {
  for (std::int64_t i = 0; i < task.rows; ++i) {
    const T* gate = task.gate_up + i * task.gate_up_row;
    T* out = task.out + i * task.size;
    for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
      const Vec<T> g = load<T>(gate + j, part);
      store<T>(out + j, g * sigmoid<T>(g) * load<T>(gate + task.size + j, part), part);
    });
  }
}

template <class T>
void swiglu_backward(const SwigluBackwardTask<T>& task) {
  constexpr T kOne = 1;
  for (std::int64_t i = 0; i < task.rows; ++i) {
    T* gate = task.gate_up + i * task.gate_up_row;
    T* up = gate + task.size;
    T* dy = task.dy + i * task.dy_row;
    const T weight = task.weights != nullptr ? task.weights[i] : kOne;
    Vec<T> products{};
    for_vectors<T>(task.size, [&](std::int64_t j, auto part) {
      const Vec<T> g = load<T>(gate + j, part);
      const Vec<T> u = load<T>(up + j, part);
      const Vec<T> d = load<T>(dy + j, part);
      const Vec<T> s = sigmoid<T>(g);
      const Vec<T> silu = g * s;
      const Vec<T> activation = silu * u;
      products += d * activation;
      const Vec<T> scaled = d * weight;
      store<T>(gate + j, scaled * u * s * (kOne + g * (kOne - s)), part);
      store<T>(up + j, scaled * silu, part);
      store<T>(dy + j, activation * weight, part);
    });
    if (task.weights != nullptr) task.dweights[i] = sum_lanes<T>(products);
  }
}

template <class T>
void combine(const CombineTask<T>& task) {
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    T* out = task.out + t * task.size;
    bool first = true;
    for (std::int64_t j = 0; j < task.k; ++j) {
      const std::int64_t row = task.row[t * task.k + j];
      if (row < 0) continue;
      const T* from = task.from + row * task.from_row;
      const T weight = task.weights != nullptr ? task.weights[t * task.weights_row + j] : T{1};
      for_vectors<T>(task.size, [&](std::int64_t c, auto part) {
        Vec<T> value = load<T>(from + c, part) * weight;
        if (!first) value += load<T>(out + c, part);
        store<T>(out + c, value, part);
      });
      first = false;
    }
    if (first) {
      for_vectors<T>(task.size,
                     [&](std::int64_t c, auto part) { store<T>(out + c, Vec<T>{}, part); });
    }
  }
}

template <class T>
void cross_entropy(const CrossEntropyTask<T>& task) {
  for (std::int64_t i = 0; i < task.rows; ++i) {
    T* x = task.logits + i * task.logits_row;
    Vec<T> best = splat(x[0]);
    std::int64_t j = 0;
    for (; j + kLanes<T> <= task.vocabulary; j += kLanes<T>) best = max<T>(best, load(x + j));
    T top = max_lanes<T>(best);
    for (; j < task.vocabulary; ++j) top = top > x[j] ? top : x[j];
    const T target = x[task.labels[i]];
    Vec<T> total{};
    for_vectors<T>(task.vocabulary, [&](std::int64_t c, auto part) {
      const Vec<T> e = within<T>(exp<T>(load<T>(x + c, part) - top), part);
      total += e;
      store<T>(x + c, e, part);
    });
    const T sum = sum_lanes<T>(total);
    task.losses[i] = __builtin_log(static_cast<double>(sum)) +
                     (static_cast<double>(top) - static_cast<double>(target));
    if (task.scale == 0.0) continue;
    const T factor = static_cast<T>(task.scale / static_cast<double>(sum));
    for_vectors<T>(task.vocabulary, [&](std::int64_t c, auto part) {
      store<T>(x + c, load<T>(x + c, part) * factor, part);
    });
    x[task.labels[i]] -= static_cast<T>(task.scale);
  }
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
