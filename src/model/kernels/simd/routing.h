#pragma once

#include "model/kernels/kernel_table.h"
#include "model/kernels/simd/vec.h"

// The router: scores of all experts, the best k of them, and the way back.
namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

// Keeps the sum of chosen sigmoid scores off zero, as DeepSeek-V3 does.
inline constexpr double kSigmoidFloor = 1e-20;

/// The k largest in falling order, the lower index first where they are equal.
template <class T>
MESHLOOM_INLINE void best_of(const T* p, std::int64_t count, std::int64_t k, T* values,
                             std::int64_t* chosen) {
  std::int64_t held = 0;
  for (std::int64_t e = 0; e < count; ++e) {
    if (held == k && !(p[e] > values[k - 1])) continue;
    std::int64_t at = held < k ? held : k - 1;
    for (; at > 0 && p[e] > values[at - 1]; --at) {
      values[at] = values[at - 1];
      chosen[at] = chosen[at - 1];
    }
    values[at] = p[e];
    chosen[at] = e;
    if (held < k) ++held;
  }
}

/// Takes the experts of all but the best groups out of the choice.
template <class T>
void limit_groups(T* choice, std::int64_t experts, std::int64_t groups, std::int64_t top_groups,
                  T* sums, T* best, std::int64_t* chosen) {
  const std::int64_t size = experts / groups;
  for (std::int64_t g = 0; g < groups; ++g) {
    const T* x = choice + g * size;
    T first = x[0] > x[1] ? x[0] : x[1];
    T second = x[0] > x[1] ? x[1] : x[0];
    for (std::int64_t e = 2; e < size; ++e) {
      if (x[e] > first) {
        second = first;
        first = x[e];
      } else if (x[e] > second) {
        second = x[e];
      }
    }
    sums[g] = first + second;
  }
  best_of<T>(sums, groups, top_groups, best, chosen);
  for (std::int64_t g = 0; g < groups; ++g) {
    bool in = false;
    for (std::int64_t j = 0; j < top_groups; ++j) in = in || chosen[j] == g;
    if (in) continue;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) {
      choice[e] = -static_cast<T>(__builtin_inf());
    }
  }
}

/// @param scratch  [experts + 2 groups + k] @param group_scratch  [top_groups].
template <class T>
void route(const RouteTask<T>& task, T* scratch, std::int64_t* group_scratch) {
  T* choice = scratch;
  T* sums = choice + task.experts;
  T* best = sums + 2 * task.groups;
  for (std::int64_t i = 0; i < task.rows; ++i) {
    const T* x = task.logits + i * task.logits_row;
    T* p = task.probabilities + i * task.experts;
    T top = x[0];
    for (std::int64_t e = 1; e < task.experts; ++e) top = top > x[e] ? top : x[e];
    Vec<T> total{};
    for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
      const Vec<T> power = within<T>(exp<T>(load<T>(x + e, part) - top), part);
      total += power;
      store<T>(p + e, power, part);
    });
    const T sum = sum_lanes<T>(total);
    task.lse[i] = top + static_cast<T>(__builtin_log(static_cast<double>(sum)));
    for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
      constexpr T kOne = 1;
      store<T>(
          p + e,
          task.softmax ? load<T>(p + e, part) / sum : kOne / (kOne + exp<T>(-load<T>(x + e, part))),
          part);
    });
    T* weights = task.weights + i * task.k;
    std::int64_t* chosen = task.chosen + i * task.k;
    if (task.bias == nullptr && task.groups == 1) {
      best_of<T>(p, task.experts, task.k, weights, chosen);
    } else {
      for (std::int64_t e = 0; e < task.experts; ++e) {
        choice[e] = task.bias != nullptr ? p[e] + task.bias[e] : p[e];
      }
      if (task.groups > 1) {
        limit_groups<T>(choice, task.experts, task.groups, task.top_groups, sums,
                        sums + task.groups, group_scratch);
      }
      best_of<T>(choice, task.experts, task.k, best, chosen);
      for (std::int64_t j = 0; j < task.k; ++j) weights[j] = p[chosen[j]];
    }
    T divisor = 1;
    if (task.normalize) {
      divisor = task.softmax ? 0 : static_cast<T>(kSigmoidFloor);
      for (std::int64_t j = 0; j < task.k; ++j) divisor += weights[j];
    }
    const T scale = static_cast<T>(task.scale);
    for (std::int64_t j = 0; j < task.k; ++j) weights[j] = weights[j] / divisor * scale;
  }
}

template <class T>
void route_backward(const RouteBackwardTask<T>& task) {
  for (std::int64_t i = 0; i < task.rows; ++i) {
    const T* p = task.probabilities + i * task.experts;
    const T* dweights = task.dweights + i * task.dweights_row;
    const T* weights = task.weights + i * task.k;
    const std::int64_t* chosen = task.chosen + i * task.k;
    T* out = task.dlogits + i * task.experts;
    T total = 1;
    T common = 0;
    if (task.extra != nullptr && !task.softmax) {
      // Through the division of every score by their sum.
      Vec<T> scores{};
      Vec<T> products{};
      for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
        const Vec<T> score = within<T>(load<T>(p + e, part), part);
        scores += score;
        products += score * within<T>(load<T>(task.extra + e, part), part);
      });
      total = sum_lanes<T>(scores);
      common = sum_lanes<T>(products) / total;
    }
    for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
      store<T>(out + e,
               task.extra != nullptr ? (load<T>(task.extra + e, part) - common) / total : Vec<T>{},
               part);
    });
    T shift = 0;
    T sum = 1;
    if (task.normalize) {
      sum = task.softmax ? 0 : static_cast<T>(kSigmoidFloor);
      for (std::int64_t j = 0; j < task.k; ++j) {
        sum += p[chosen[j]];
        shift += dweights[j] * weights[j];
      }
    }
    const T scale = static_cast<T>(task.scale);
    for (std::int64_t j = 0; j < task.k; ++j) {
      out[chosen[j]] += (scale * dweights[j] - shift) / sum;
    }
    if (!task.softmax) {
      for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
        constexpr T kOne = 1;
        const Vec<T> score = load<T>(p + e, part);
        store<T>(out + e, load<T>(out + e, part) * score * (kOne - score), part);
      });
      continue;
    }
    Vec<T> products{};
    for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
      products += load<T>(out + e, part) * load<T>(p + e, part);
    });
    const T mean = sum_lanes<T>(products) - static_cast<T>(2.0 * task.z_weight) * task.lse[i];
    for_vectors<T>(task.experts, [&](std::int64_t e, auto part) {
      store<T>(out + e, load<T>(p + e, part) * (load<T>(out + e, part) - mean), part);
    });
  }
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
