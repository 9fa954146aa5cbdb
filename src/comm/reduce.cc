#include "comm/internal/reduce.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

// Elements reduced at a time: the accumulator stays in the first-level cache.
constexpr std::int64_t kBlock = 1024;

template <class T>
using Accumulator =
    std::conditional_t<std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>, float, T>;

template <class T>
struct Sum {
  static T apply(T a, T b) { return static_cast<T>(a + b); }
};
template <class T>
struct Max {
  static T apply(T a, T b) { return b > a || b != b ? b : a; }
};
template <class T>
struct Min {
  static T apply(T a, T b) { return b < a || b != b ? b : a; }
};

template <class T, template <class> class Op>
void reduce_typed(std::span<const void* const> sources, std::span<void* const> destinations,
                  std::int64_t begin, std::int64_t end) {
  using A = Accumulator<T>;
  std::array<A, kBlock> sum;
  std::array<T, kBlock> rounded;
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t count = std::min(kBlock, end - at);
    const T* first = static_cast<const T*>(sources[0]) + at;
    for (std::int64_t i = 0; i < count; ++i) sum[i] = static_cast<A>(first[i]);
    for (const void* source : sources.subspan(1)) {
      const T* next = static_cast<const T*>(source) + at;
      for (std::int64_t i = 0; i < count; ++i) {
        sum[i] = Op<A>::apply(sum[i], static_cast<A>(next[i]));
      }
    }
    const T* result = nullptr;
    if constexpr (std::is_same_v<A, T>) {
      result = sum.data();
    } else {
      for (std::int64_t i = 0; i < count; ++i) rounded[i] = static_cast<T>(sum[i]);
      result = rounded.data();
    }
    for (void* destination : destinations) {
      std::memcpy(static_cast<T*>(destination) + at, result, sizeof(T) * count);
    }
  }
}

template <class T>
void reduce_with(ReduceOp op, std::span<const void* const> sources,
                 std::span<void* const> destinations, std::int64_t begin, std::int64_t end) {
  switch (op) {
    case ReduceOp::kSum:
      return reduce_typed<T, Sum>(sources, destinations, begin, end);
    case ReduceOp::kMax:
      return reduce_typed<T, Max>(sources, destinations, begin, end);
    case ReduceOp::kMin:
      return reduce_typed<T, Min>(sources, destinations, begin, end);
  }
}

}  // namespace

bool is_supported(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Double:
    case c10::ScalarType::Float:
    case c10::ScalarType::BFloat16:
    case c10::ScalarType::Half:
    case c10::ScalarType::Long:
    case c10::ScalarType::Int:
    case c10::ScalarType::Byte:
      return true;
    default:
      return false;
  }
}

void reduce_range(c10::ScalarType type, ReduceOp op, std::span<const void* const> sources,
                  std::span<void* const> destinations, std::int64_t begin, std::int64_t end) {
  switch (type) {
    case c10::ScalarType::Double:
      return reduce_with<double>(op, sources, destinations, begin, end);
    case c10::ScalarType::Float:
      return reduce_with<float>(op, sources, destinations, begin, end);
    case c10::ScalarType::BFloat16:
      return reduce_with<c10::BFloat16>(op, sources, destinations, begin, end);
    case c10::ScalarType::Half:
      return reduce_with<c10::Half>(op, sources, destinations, begin, end);
    case c10::ScalarType::Long:
      return reduce_with<std::int64_t>(op, sources, destinations, begin, end);
    case c10::ScalarType::Int:
      return reduce_with<std::int32_t>(op, sources, destinations, begin, end);
    case c10::ScalarType::Byte:
      return reduce_with<std::uint8_t>(op, sources, destinations, begin, end);
    default:
      throw NotSupported("comm.reduce", std::string("dtype ") + c10::toString(type));
  }
}

}  // namespace meshloom::comm::detail
