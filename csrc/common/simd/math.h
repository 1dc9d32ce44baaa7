// Vectorised exp2, exp, log2, log-sigmoid and tanh, one code path per precision for all instruction sets.
//
// Error bounds in units in the last place, float and double, with or without FMA (tests/native/simd_test.cpp sweeps
// them against long double):
//   exp2 1.25   exp 1.5   log2 1.25   log2_1p 1.25   log_sigmoid 2.5   tanh 2   its derivative 4
// Denormal results are flushed to zero; everything else follows IEEE: exp2(-inf) = 0, exp2(inf) = inf, log2(0) = -inf,
// log2(x < 0) = NaN, and NaN stays NaN.
#pragma once

#include "common/simd/vec.h"

namespace mmk {
namespace MMK_ISA {

// The floating-point layout, and the bounds between which 2^x and e^x are normal.
template <class E>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr float round_to_int = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  static constexpr float smallest_normal = 0x1p-126f, infinity = __builtin_inff(), nan = __builtin_nanf("");
  static constexpr float exp2_low = -126.0f, exp2_high = 128.0f;
  static constexpr float exp_low = -87.3365448f, exp_high = 88.7228394f;
  static constexpr float log2e = 0x1.715476p0f, ln2 = 0x1.62e430p-1f;
  // ln 2 in two parts, the first short enough that n * ln2_high is exact; log2(e) likewise, for an argument truncated
  // by `high_bits`.
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cf8p-20f;
  static constexpr float log2e_high = 0x1.716p0f, log2e_low = -0x1.7135a8fap-13f;
  static constexpr uint32_t high_bits = ~0xfffu;
};
template <>
struct FloatTraits<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr double round_to_int = 0x1.8p52;
  static constexpr double smallest_normal = 0x1p-1022, infinity = __builtin_inf(), nan = __builtin_nan("");
  static constexpr double exp2_low = -1022.0, exp2_high = 1024.0;
  static constexpr double exp_low = -708.39641853226408, exp_high = 709.78271289338397;
  static constexpr double log2e = 0x1.71547652b82fep0, ln2 = 0x1.62e42fefa39efp-1;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double log2e_high = 0x1.715476p0, log2e_low = 0x1.4ae0bf85ddf44p-26;
  static constexpr uint64_t high_bits = ~uint64_t{0x7ffffff};
};

// Minimax polynomials (Remez exchange, relative error in parentheses), lowest power first.
// (2^f - 1) / f on [-1/2, 1/2] (2.0e-9, 3.4e-18)
constexpr float kExp2Float[] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                0x1.3b2d4cp-7f, 0x1.5f3e52p-10f, 0x1.41fbbcp-13f};
constexpr double kExp2Double[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a4p-3,  0x1.c6b08d7049fe8p-5,
                                  0x1.3b2ab6fba011ap-7,  0x1.5d87fe78cd6dcp-10, 0x1.4309130ed8bc8p-13,
                                  0x1.ffcbfba97c6d8p-17, 0x1.62bfc79d76438p-20, 0x1.b5267cea5f52ep-24,
                                  0x1.e61b4f504861fp-28, 0x1.e79ba5e959c1bp-32};
// (log2(1 + f) - f log2(e)) / f^2 on [sqrt(1/2) - 1, 1/2] (2.4e-9 of log2)
constexpr float kLog2Float[] = {-0x1.715474p-1f, 0x1.ec7082p-2f,  -0x1.715626p-2f, 0x1.2780d0p-2f,  -0x1.ebffd0p-3f,
                                0x1.a38e76p-3f,  -0x1.752f92p-3f, 0x1.68e824p-3f,  -0x1.39c622p-3f, 0x1.213f56p-4f};
// (2 atanh(s) / s - 2) / s^2 as a function of s^2, |s| <= 1/5 (1.4e-19)
constexpr double kAtanhDouble[] = {0x1.555555555554fp-1, 0x1.999999999c0f7p-2, 0x1.24924921ec0d0p-2,
                                   0x1.c71c7488d92a5p-3, 0x1.745c4c7ae1969p-3, 0x1.3b358baef3276p-3,
                                   0x1.0dcf13bb99606p-3, 0x1.1b69ec6c4d0e5p-3};
// (tanh(x) / x - 1) / x^2 as a function of x^2, |x| <= 0.55 (1.1e-9, 5.8e-19 of tanh)
constexpr float kTanhFloat[] = {-0x1.55554ap-2f, 0x1.110d26p-3f, -0x1.b9287ap-5f, 0x1.593d08p-6f, -0x1.9b3046p-8f};
constexpr double kTanhDouble[] = {-0x1.555555555554fp-2,  0x1.111111111079fp-3,  -0x1.ba1ba1b97d88fp-5,
                                  0x1.664f485970a5cp-6,   -0x1.226e2f147b04ep-7, 0x1.d6d29b96e7615p-9,
                                  -0x1.7d8fd3ad75e7ap-10, 0x1.3483ae90b5a72p-11, -0x1.e96fc5ebe95abp-13,
                                  0x1.5d745a65bd7b7p-14,  -0x1.47110b57cb041p-16};

// c[0] + x (c[1] + x (...)), every step one fma.
template <class E, int n>
MMK_INLINE Vec<E> polynomial(Vec<E> x, const E (&c)[n]) {
  Vec<E> sum = splat(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// ---- exp2, exp ------------------------------------------------------------------------------------------------------

MMK_INLINE Vec<float> exp2_fraction(Vec<float> f) { return polynomial(f, kExp2Float) * f + 1.0f; }
MMK_INLINE Vec<double> exp2_fraction(Vec<double> f) { return polynomial(f, kExp2Double) * f + 1.0; }

#if defined(__AVX512F__)
// scalef overflows to infinity by itself; the mask writes the zeros (`not less than` keeps NaNs).
MMK_INLINE Vec<float> scale_or_zero(Vec<float> p, Vec<float> n, Vec<float> x, float low) {
  const auto keep = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(low), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
}
MMK_INLINE Vec<double> scale_or_zero(Vec<double> p, Vec<double> n, Vec<double> x, double low) {
  const auto keep = _mm512_cmp_pd_mask((__m512d)x, (__m512d)splat(low), _CMP_NLT_UQ);
  return (Vec<double>)_mm512_maskz_scalef_pd(keep, (__m512d)p, (__m512d)n);
}
MMK_INLINE Vec<float> round_nearest(Vec<float> x) { return (Vec<float>)_mm512_maskz_roundscale_ps(-1, (__m512)x, 8); }
MMK_INLINE Vec<double> round_nearest(Vec<double> x) {
  return (Vec<double>)_mm512_maskz_roundscale_pd(-1, (__m512d)x, 8);
}
#endif

// e^x or 2^x from n = round(x in units of ln 2 or 1) and the remaining fraction f(n); `low` and `high` bound the x with
// normal results.
template <class E, class Fraction>
MMK_INLINE Vec<E> exp_by_parts(Vec<E> x, E scale, E low, E high, Fraction fraction) {
#if defined(__AVX512F__)
  x = min(splat(high * (1 + E{1} / 128)), x);  // clamp beyond `high`, but with a finite fraction
  const Vec<E> n = round_nearest(x * scale);
  return scale_or_zero(exp2_fraction(fraction(x, n)), n, x, low);
#else
  using F = FloatTraits<E>;
  using Int = typename IntOf<E>::type;
  const Vec<E> shifted = x * scale + F::round_to_int;
  const Vec<E> n = shifted - F::round_to_int;
  const auto exponent = (bit_cast<Vec<Int>>(shifted) - bit_cast<Int>(F::round_to_int)) << F::mantissa_bits;
  const Vec<E> p = exp2_fraction(fraction(x, n));
  Vec<E> y = bit_cast<Vec<E>>(bit_cast<Vec<Int>>(p) + exponent);
  y = x < high ? y : splat(F::infinity);
  y = x < low ? Vec<E>{} : y;
  return x == x ? y : x;
#endif
}

// 2^x
template <class V, class E = LaneOf<V>>
MMK_INLINE V exp2(V x) {
  using F = FloatTraits<E>;
  return exp_by_parts<E>(x, E{1}, F::exp2_low, F::exp2_high, [](Vec<E> v, Vec<E> n) { return v - n; });
}

// e^x
template <class V, class E = LaneOf<V>>
MMK_INLINE V exp(V x) {
  using F = FloatTraits<E>;
  return exp_by_parts<E>(x, F::log2e, F::exp_low, F::exp_high,
                         [](Vec<E> v, Vec<E> n) { return ((v - n * F::ln2_high) - n * F::ln2_low) * F::log2e; });
}

// ---- log2 -----------------------------------------------------------------------------------------------------------

// log2(1 + f) - f log2(e): small relative to f log2(e), so its rounding hardly matters.
MMK_INLINE Vec<float> log2_curvature(Vec<float> f) { return polynomial(f, kLog2Float) * (f * f); }
MMK_INLINE Vec<double> log2_curvature(Vec<double> f) {
  const Vec<double> s = f / (f + 2.0), z = s * s, half_square = 0.5 * f * f;
  const Vec<double> rest = polynomial(z, kAtanhDouble) * z;
  return (s * (half_square + rest) - half_square) * FloatTraits<double>::log2e;
}

// e + log2(1 + f) for an integer e and f in [sqrt(1/2) - 1, 1/2]. f log2(e) is split so that its leading part is exact;
// the sum of that part and e carries its rounding error.
template <class E>
MMK_INLINE Vec<E> log2_sum(Vec<E> e, Vec<E> f) {
  using F = FloatTraits<E>;
  using Bits = typename IntOf<E>::bits;
  const Vec<E> f_high = bit_cast<Vec<E>>(bit_cast<Vec<Bits>>(f) & F::high_bits);
  const Vec<E> high = f_high * F::log2e_high;
  const Vec<E> low = (f - f_high) * F::log2e_high + f * F::log2e_low;
  const Vec<E> sum = e + high;
  const Vec<E> error = high - (sum - e);
  return sum + (error + (low + log2_curvature(f)));
}

// log2(x)
template <class V, class E = LaneOf<V>>
MMK_INLINE V log2(V x) {
  using F = FloatTraits<E>;
  using Int = typename IntOf<E>::type;
  const auto subnormal = x < F::smallest_normal;
  const Vec<E> normal = subnormal ? x * E(int64_t{1} << F::mantissa_bits) : x;
  const Vec<Int> offset = bit_cast<Vec<Int>>(normal) - bit_cast<Int>(E(0.70710678118654752440));
  const Vec<Int> exponent = offset >> F::mantissa_bits;
  const Vec<E> m = bit_cast<Vec<E>>(bit_cast<Vec<Int>>(normal) - (exponent << F::mantissa_bits));
  const Vec<E> e = __builtin_convertvector(exponent, Vec<E>) - (subnormal ? splat(E(F::mantissa_bits)) : Vec<E>{});
  const Vec<E> y = log2_sum<E>(e, m - E{1});
  const Vec<E> outside = x == E{0} ? splat(-F::infinity) : (x > E{0} ? splat(F::infinity) : splat(F::nan));
  return select((x > E{0}) & (x < F::infinity), y, outside);
}

// log2(1 + x) for x in [0, 1] (for softplus), accurate down to the smallest x.
template <class V, class E = LaneOf<V>>
MMK_INLINE V log2_1p(V x) {
  const auto upper = x > E(0.5);  // where x - 1 is exact
  const Vec<E> f = upper ? E(0.5) * (x - E{1}) : x;
  return log2_sum<E>(upper ? splat(E{1}) : Vec<E>{}, f);
}

// log(sigmoid(x)) = min(x, 0) - log(1 + e^-|x|), natural logarithm
template <class V, class E = LaneOf<V>>
MMK_INLINE V log_sigmoid(V x) {
  return min(Vec<E>{}, x) - log2_1p(exp(min(x, -x))) * FloatTraits<E>::ln2;
}

// ---- tanh -----------------------------------------------------------------------------------------------------------

MMK_INLINE Vec<float> tanh_curvature(Vec<float> z) { return polynomial(z, kTanhFloat); }
MMK_INLINE Vec<double> tanh_curvature(Vec<double> z) { return polynomial(z, kTanhDouble); }

// tanh(x): an odd polynomial near 0, where 1 - 2 / (e^2|x| + 1) would cancel
template <class V, class E = LaneOf<V>>
MMK_INLINE V tanh(V x) {
  const Vec<E> z = x * x, size = x < E{0} ? -x : x;
  const Vec<E> near = x + x * (z * tanh_curvature(z));
  const Vec<E> far = E{1} - E{2} / (exp(size + size) + E{1});
  return size < E(0.55) ? near : (x < E{0} ? -far : far);
}

// tanh(x), and in `slope` its derivative, which 1 - tanh^2 would lose where tanh rounds to 1
template <class V, class E = LaneOf<V>>
MMK_INLINE V tanh(V x, V& slope) {
  const Vec<E> z = x * x, size = x < E{0} ? -x : x;
  const Vec<E> near = x + x * (z * tanh_curvature(z));
  const Vec<E> rest = E{2} / (exp(size + size) + E{1}), far = E{1} - rest;
  slope = size < E(0.55) ? E{1} - near * near : rest * (E{2} - rest);
  return size < E(0.55) ? near : (x < E{0} ? -far : far);
}

}  // namespace MMK_ISA
}  // namespace mmk
