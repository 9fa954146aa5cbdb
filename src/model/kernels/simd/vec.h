#pragma once

// A small vector type over GCC's vector extensions. This header and its neighbours are compiled
// once per instruction set (MESHLOOM_SIMD_LEVEL names the namespace, MESHLOOM_SIMD_BYTES the
// register width), so they include nothing with inline functions that the linker could merge across
// levels.

#include <cstddef>
#include <cstdint>

#define MESHLOOM_INLINE inline __attribute__((always_inline))

namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL {

inline constexpr int kVectorBytes = MESHLOOM_SIMD_BYTES;

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using Int = std::int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t IntVec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  using Int = std::int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t IntVec __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecOf<T>::Vec;
template <class T>
using IntVec = typename VecOf<T>::IntVec;
/// Numbers in a vector.
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
MESHLOOM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::Loose*>(p);
}
template <class T>
MESHLOOM_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::Loose*>(p) = x;
}
template <class T>
MESHLOOM_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
/// The first n of kLanes numbers, zeros after them.
template <class T>
MESHLOOM_INLINE Vec<T> load_part(const T* p, std::int64_t n) {
  T full[kLanes<T>] = {};
  __builtin_memcpy(full, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(full);
}
template <class T>
MESHLOOM_INLINE void store_part(T* p, Vec<T> x, std::int64_t n) {
  T full[kLanes<T>];
  store(full, x);
  __builtin_memcpy(p, full, static_cast<std::size_t>(n) * sizeof(T));
}

/// How much of a vector a step of for_vectors is about.
struct Whole {};
struct Part {
  std::int64_t count;
};
template <class T>
MESHLOOM_INLINE Vec<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
MESHLOOM_INLINE Vec<T> load(const T* p, Part part) {
  return load_part(p, part.count);
}
template <class T>
MESHLOOM_INLINE void store(T* p, Vec<T> x, Whole) {
  store(p, x);
}
template <class T>
MESHLOOM_INLINE void store(T* p, Vec<T> x, Part part) {
  store_part(p, x, part.count);
}
/// Calls body(first, Whole or Part) for the vectors of `size` numbers, in order.
template <class T, class Body>
MESHLOOM_INLINE void for_vectors(std::int64_t size, const Body& body) {
  std::int64_t j = 0;
  for (; j + kLanes<T> <= size; j += kLanes<T>) body(j, Whole{});
  if (j < size) body(j, Part{size - j});
}

template <class T>
MESHLOOM_INLINE IntVec<T> lane_index() {
  IntVec<T> index{};
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
  return index;
}

/// Zeros where the vector is past the end of its row.
template <class T>
MESHLOOM_INLINE Vec<T> within(Vec<T> x, Whole) {
  return x;
}
template <class T>
MESHLOOM_INLINE Vec<T> within(Vec<T> x, Part part) {
  return lane_index<T>() < static_cast<typename VecOf<T>::Int>(part.count) ? x : Vec<T>{};
}

/// The larger of each pair; b where one of them is NaN.
template <class T>
MESHLOOM_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
// One instruction, which the compiler does not make of the comparison at every width.
#if MESHLOOM_SIMD_BYTES == 64 && defined(__AVX512F__)
  constexpr int kCurrentRounding = 4;
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_ia32_maxps512_mask(a, b, a, static_cast<unsigned short>(-1), kCurrentRounding);
  } else {
    return __builtin_ia32_maxpd512_mask(a, b, a, static_cast<unsigned char>(-1), kCurrentRounding);
  }
#else
  return a > b ? a : b;
#endif
}

/// Lane i gets lane i ^ Width.
template <class T, int Width>
MESHLOOM_INLINE Vec<T> swap_lanes(Vec<T> x) {
  return __builtin_shuffle(x, lane_index<T>() ^ static_cast<typename VecOf<T>::Int>(Width));
}
/// Sum and largest of all lanes, as a tree.
template <class T, int Width = kLanes<T> / 2>
MESHLOOM_INLINE T sum_lanes(Vec<T> x) {
  x += swap_lanes<T, Width>(x);
  if constexpr (Width > 1) return sum_lanes<T, Width / 2>(x);
  return x[0];
}
template <class T, int Width = kLanes<T> / 2>
MESHLOOM_INLINE T max_lanes(Vec<T> x) {
  x = max<T>(x, swap_lanes<T, Width>(x));
  if constexpr (Width > 1) return max_lanes<T, Width / 2>(x);
  return x[0];
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLowest = -126.0F;
  static constexpr float kHighest = 127.0F;
  static constexpr int kMantissa = 23;
  static constexpr float kLn2High = 0.693359375F;
  static constexpr float kLn2Low = -2.12194440e-4F;
};
template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -1022.0;
  static constexpr double kHighest = 1023.0;
  static constexpr int kMantissa = 52;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
};

template <class T>
inline constexpr T kLog2E = static_cast<T>(1.4426950408889634);

/// Horner's rule, highest coefficient first.
template <class T, std::size_t N>
MESHLOOM_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> p = splat(c[0]);
#pragma GCC unroll 16
  for (std::size_t i = 1; i < N; ++i) p = p * x + c[i];
  return p;
}

// Minimax polynomials of 2^f on [-1/2, 1/2] (relative error 7.5e-8 and 3e-18) and of e^f on
// [-ln2/2, ln2/2] (2e-9 and 3e-18).
MESHLOOM_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  constexpr float kC[] = {1.327647263e-3F, 9.675541343e-3F, 5.550713272e-2F,
                          2.402211972e-1F, 6.931469671e-1F, 1.000000072F};
  return polynomial<float>(f, kC);
}
MESHLOOM_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  constexpr double kC[] = {4.43528270695727715e-10, 7.0741056135081428e-9,  1.01781980216719308e-7,
                           1.32154330896763992e-6,  1.52527334899885256e-5, 1.54035304625144321e-4,
                           1.33335581467899217e-3,  9.61812910758833524e-3, 5.55041086648199216e-2,
                           2.40226506959101562e-1,  6.9314718055994533e-1,  1.0};
  return polynomial<double>(f, kC);
}
MESHLOOM_INLINE Vec<float> exp_fraction(Vec<float> f) {
  constexpr float kC[] = {1.383683574e-3F,
                          8.374824031e-3F,
                          4.166822619e-2F,
                          1.666642007e-1F,
                          4.999999208e-1F,
                          1.000000036F,
                          1.0F};
  return polynomial<float>(f, kC);
}
MESHLOOM_INLINE Vec<double> exp_fraction(Vec<double> f) {
  constexpr double kC[] = {2.49943032738143951e-8,
                           2.76323081748944858e-7,
                           2.75576226204719804e-6,
                           2.48014864814364009e-5,
                           1.98412694324704883e-4,
                           1.38888889512610416e-3,
                           8.33333333355943393e-3,
                           4.16666666664926297e-2,
                           1.66666666666661682e-1,
                           5.0000000000000177e-1,
                           1.0,
                           1.0};
  return polynomial<double>(f, kC);
}

/// p * 2^n for n given as magic + n.
template <class T>
MESHLOOM_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> shifted) {
  const IntVec<T> n = reinterpret_cast<IntVec<T>>(shifted) << ExpConstants<T>::kMantissa;
  return reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(p) + n);
}

/// 2^x for x <= kHighest; from kLowest down it gives the smallest normal number.
template <class T>
MESHLOOM_INLINE Vec<T> exp2(Vec<T> x) {
  using C = ExpConstants<T>;
  x = max<T>(splat(C::kLowest), x);
  const Vec<T> shifted = x + C::kMagic;
  return scale_by_power<T>(exp2_fraction(x - (shifted - C::kMagic)), shifted);
}

/// e^x, within 2 units in the last place; clamped to the normal range at both ends. NaN stays NaN.
template <class T>
MESHLOOM_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  constexpr T kLow = C::kLowest / kLog2E<T>;
  constexpr T kHigh = C::kHighest / kLog2E<T>;
  x = x < kLow ? splat(kLow) : x;
  x = x > kHigh ? splat(kHigh) : x;
  const Vec<T> shifted = x * kLog2E<T> + C::kMagic;
  const Vec<T> n = shifted - C::kMagic;
  const Vec<T> f = (x - n * C::kLn2High) - n * C::kLn2Low;
  return scale_by_power<T>(exp_fraction(f), shifted);
}

}  // namespace meshloom::model::kernels::MESHLOOM_SIMD_LEVEL
