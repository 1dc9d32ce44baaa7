// One register of floats or doubles for the instruction set being compiled, with loads and stores of every element
// type.
//
// Vec<T> is a GCC/clang vector: + - * /, comparisons and `mask ? a : b` work directly. Intrinsics appear only where the
// vector extension lacks an operation. Everything is in mmk::MMK_ISA and no std:: function is called, so the linker
// cannot merge code of one instruction set into another.
#pragma once

#ifndef MMK_ISA
#error "vec.h belongs in *_cpu.cpp files, which are compiled once per instruction set with MMK_ISA defined"
#endif

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // GCC 12 warns about its own _mm512_undefined_ps (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MMK_INLINE inline __attribute__((always_inline))
// For what few calls need, so that it takes no registers from the loops of all the others.
#define MMK_NOINLINE __attribute__((noinline))

namespace mmk {
namespace MMK_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;  // SSE2, NEON
#endif

template <class E, int kBytes>
struct VecType {
  typedef E type __attribute__((vector_size(kBytes)));
};
template <class E>
using Vec = typename VecType<E, kVecBytes>::type;
template <class E>
using HalfVec = typename VecType<E, kVecBytes / 2>::type;

// Lanes in a Vec<E>.
template <class E>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(E));

// The element type of a vector.
template <class V>
struct LaneType;
template <>
struct LaneType<Vec<float>> {
  using type = float;
};
template <>
struct LaneType<Vec<double>> {
  using type = double;
};
template <class V>
using LaneOf = typename LaneType<V>::type;

// The integer type that a comparison of E yields per lane, and the one that holds E's bits.
template <class E>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
  using bits = uint32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
  using bits = uint64_t;
};

template <class To, class From>
MMK_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class E>
MMK_INLINE Vec<E> splat(E x) {
  return x - Vec<E>{};  // x - 0, because x + 0 would lose the sign of -0
}

template <class E>
MMK_INLINE Vec<E> load_as(const void* p) {
  Vec<E> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// ---- conversions ----------------------------------------------------------------------------------------------------

MMK_INLINE Vec<uint32_t> widen(HalfVec<uint16_t> h) { return __builtin_convertvector(h, Vec<uint32_t>); }
MMK_INLINE HalfVec<uint16_t> narrow(Vec<uint32_t> w) { return __builtin_convertvector(w, HalfVec<uint16_t>); }

MMK_INLINE Vec<float> bf16_to_float(HalfVec<uint16_t> h) { return bit_cast<Vec<float>>(widen(h) << 16); }

// Round to nearest even; a NaN stays a NaN (quieted), subnormals are kept.
MMK_INLINE HalfVec<uint16_t> float_to_bf16(Vec<float> x) {
  const auto bits = bit_cast<Vec<uint32_t>>(x);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
  return narrow(x == x ? rounded : quiet);
}

MMK_INLINE Vec<float> f16_to_float(HalfVec<uint16_t> h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h));
#else
  // Move exponent and mantissa into place and rebias; the all-ones exponent needs a second bias, and subnormals are
  // normalised by an exact subtraction.
  const auto w = widen(h);
  const auto magnitude = (w & 0x7fffu) << 13;
  const auto exponent = magnitude & (0x7c00u << 13);
  const auto rebiased = magnitude + ((127u - 15u) << 23);
  const auto special = rebiased + ((128u - 16u) << 23);
  const auto tiny = bit_cast<Vec<float>>(rebiased + (1u << 23)) - 0x1p-14f;
  const auto finite = exponent == 0u ? bit_cast<Vec<uint32_t>>(tiny) : rebiased;
  const auto bits = exponent == (0x7c00u << 13) ? special : finite;
  return bit_cast<Vec<float>>(bits | (w & 0x8000u) << 16);
#endif
}

// Round to nearest even, overflow to infinity; a NaN stays a NaN (quieted), subnormals are kept.
MMK_INLINE HalfVec<uint16_t> float_to_f16(Vec<float> x) {
#if defined(__AVX512F__)
  return (HalfVec<uint16_t>)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfVec<uint16_t>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (HalfVec<uint16_t>)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
#else
  const auto bits = bit_cast<Vec<uint32_t>>(x);
  const auto sign = bits & 0x80000000u;
  const auto magnitude = bits ^ sign;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the adder round at its last bit, 2^-24.
  const auto tiny = bit_cast<Vec<uint32_t>>(bit_cast<Vec<float>>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const auto normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const auto finite = magnitude < (113u << 23) ? tiny : normal;
  const auto infinite = Vec<uint32_t>{} + 0x7c00u;
  const auto nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const auto special = magnitude > (255u << 23) ? nan : infinite;
  return narrow((magnitude >= (143u << 23) ? special : finite) | sign >> 16);
#endif
}

// ---- memory ---------------------------------------------------------------------------------------------------------
// load(p) reads kLanes<ComputeOf<T>> elements into the compute type, store(p, v) writes them, rounding to nearest even.
// load_n and store_n touch the first n elements only (0 <= n <= lanes); load_n fills the other lanes with zero.

MMK_INLINE HalfVec<uint16_t> load_half(const void* p) {
  HalfVec<uint16_t> h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}
MMK_INLINE Vec<float> load(const float* p) { return load_as<float>(p); }
MMK_INLINE Vec<double> load(const double* p) { return load_as<double>(p); }
MMK_INLINE Vec<float> load(const bf16* p) { return bf16_to_float(load_half(p)); }
MMK_INLINE Vec<float> load(const f16* p) { return f16_to_float(load_half(p)); }

MMK_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
MMK_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
MMK_INLINE void store(bf16* p, Vec<float> v) {
  const auto h = float_to_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
MMK_INLINE void store(f16* p, Vec<float> v) {
  const auto h = float_to_f16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

#if defined(__AVX512F__)
MMK_INLINE uint32_t first_lanes(int64_t n) { return (1u << n) - 1u; }
MMK_INLINE Vec<float> load_n(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), p);
}
MMK_INLINE Vec<double> load_n(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
}
MMK_INLINE HalfVec<uint16_t> load_half_n(const void* p, int64_t n) {
  return (HalfVec<uint16_t>)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n)), p);
}
MMK_INLINE Vec<float> load_n(const bf16* p, int64_t n) { return bf16_to_float(load_half_n(p, n)); }
MMK_INLINE Vec<float> load_n(const f16* p, int64_t n) { return f16_to_float(load_half_n(p, n)); }
MMK_INLINE void store_n(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n)), (__m512)v);
}
MMK_INLINE void store_n(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), (__m512d)v);
}
MMK_INLINE void store_half_n(void* p, HalfVec<uint16_t> h, int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first_lanes(n)), (__m256i)h);
}
MMK_INLINE void store_n(bf16* p, Vec<float> v, int64_t n) { store_half_n(p, float_to_bf16(v), n); }
MMK_INLINE void store_n(f16* p, Vec<float> v, int64_t n) { store_half_n(p, float_to_f16(v), n); }
#else
#if defined(__AVX2__)
MMK_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MMK_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
MMK_INLINE Vec<float> load_n(const float* p, int64_t n) { return (Vec<float>)_mm256_maskload_ps(p, first_lanes32(n)); }
MMK_INLINE Vec<double> load_n(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes64(n));
}
MMK_INLINE void store_n(float* p, Vec<float> v, int64_t n) { _mm256_maskstore_ps(p, first_lanes32(n), (__m256)v); }
MMK_INLINE void store_n(double* p, Vec<double> v, int64_t n) { _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)v); }
#endif
template <class T>
MMK_INLINE Vec<ComputeOf<T>> load_n(const T* p, int64_t n) {
  T lanes[kLanes<ComputeOf<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
MMK_INLINE void store_n(T* p, Vec<ComputeOf<T>> v, int64_t n) {
  T lanes[kLanes<ComputeOf<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// max(a, b): if either is NaN, b on x86 and NaN on AArch64. Write max(bound, x) to keep a NaN in x.
#if defined(__AVX512F__)
MMK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
MMK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
MMK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
MMK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
MMK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
MMK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
MMK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
MMK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
MMK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b); }
MMK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_min_ps((__m128)a, (__m128)b); }
MMK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_max_pd((__m128d)a, (__m128d)b); }
MMK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_min_pd((__m128d)a, (__m128d)b); }
#elif defined(__aarch64__)
MMK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
MMK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return (Vec<float>)vminq_f32((float32x4_t)a, (float32x4_t)b); }
MMK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
  return (Vec<double>)vmaxq_f64((float64x2_t)a, (float64x2_t)b);
}
MMK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) {
  return (Vec<double>)vminq_f64((float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
MMK_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
MMK_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#endif

// Lane-wise `mask ? a : b`; a mask is what a comparison of two Vec<E> yields.
template <class M, class V>
MMK_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// a * b + c: one rounding with FMA (AVX2 and up, AArch64), two on the x86 baseline.
template <class V>
MMK_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// Reduces all lanes to one by halving, in a fixed order.
template <class V, class Op>
MMK_INLINE LaneOf<V> reduce(V v, Op op) {
  using E = LaneOf<V>;
  E lane[sizeof(V) / sizeof(E)];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = sizeof(V) / sizeof(E) / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = op(lane[i], lane[i + width]);
  return lane[0];
}
#if defined(__AVX512F__)
MMK_INLINE float reduce_add(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
MMK_INLINE float reduce_max(Vec<float> v) { return _mm512_reduce_max_ps((__m512)v); }
MMK_INLINE double reduce_add(Vec<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
MMK_INLINE double reduce_max(Vec<double> v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
template <class V>
MMK_INLINE LaneOf<V> reduce_add(V v) {
  return reduce(v, [](LaneOf<V> a, LaneOf<V> b) { return a + b; });
}
template <class V>
MMK_INLINE LaneOf<V> reduce_max(V v) {
  return reduce(v, [](LaneOf<V> a, LaneOf<V> b) { return a > b ? a : b; });
}
#endif

}  // namespace MMK_ISA
}  // namespace mmk
