// Conversions, memory and arithmetic of csrc/common/simd, and the table of all tests.
#include "simd_test_cpu.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class H>
void check_encode(float x, const char* name, Failures& fail) {
  constexpr int L = kLanes<float>;
  H got[L];
  float in[L];
  for (int i = 0; i < L; ++i) in[i] = x;
  store(got, load(in));
  H want;
  encode(x, want);
  for (int i = 0; i < L; ++i) {
    const bool ok =
        isnan(x) ? isnan(decode(got[i])) && (got[i].bits >> 15) == (signbit(x) ? 1 : 0) : got[i].bits == want.bits;
    if (fail(ok)) printf("  %s(%a): got %04x, expected %04x\n", name, x, got[i].bits, want.bits);
  }
}

template <class H>
void check_half(const char* name, Failures& fail) {
  constexpr int L = kLanes<float>;
  for (int start = 0; start < 65536; start += L) {
    H in[L];
    float out[L];
    for (int i = 0; i < L; ++i) in[i].bits = static_cast<uint16_t>(start + i);
    store(out, load(in));
    for (int i = 0; i < L; ++i)
      if (fail(same(out[i], decode(in[i]))))
        printf("  float(%s %04x): got %a, expected %a\n", name, in[i].bits, out[i], decode(in[i]));
  }
  // Every value, the midpoint to its neighbour (a tie) and one float to either side of it.
  for (int h = 0; h < 65536; ++h) {
    H here{static_cast<uint16_t>(h)}, next{static_cast<uint16_t>(h + 1)};
    check_encode<H>(static_cast<float>(decode(here)), name, fail);
    const float tie = static_cast<float>(0.5 * (decode(here) + decode(next)));
    if (!isfinite(decode(here)) || !isfinite(tie)) continue;
    check_encode<H>(tie, name, fail);
    check_encode<H>(nextafterf(tie, INFINITY), name, fail);
    check_encode<H>(nextafterf(tie, -INFINITY), name, fail);
  }
  Random random;
  for (int i = 0; i < 1 << 18; ++i) check_encode<H>(bit_cast<float>(random.bits()), name, fail);
}

int test_conversions() {
  Failures fail;
  check_half<bf16>("bf16", fail);
  check_half<f16>("f16", fail);
  return fail.count;
}

// load_n and store_n at every n: the right lanes, zeros beyond, no access past the end.
template <class T>
void check_memory(const char* name, Failures& fail) {
  using C = ComputeOf<T>;
  constexpr int L = kLanes<C>;
  for (int n = 0; n <= L; ++n) {
    Guarded<T> source(n), target(n);
    for (int i = 0; i < n; ++i) encode(i + 1, source.data[i]);
    const Vec<C> v = load_n(source.data, n);
    for (int i = 0; i < L; ++i)
      if (fail(v[i] == (i < n ? i + 1 : 0))) printf("  load_n %s n=%d lane %d: %g\n", name, n, i, double(v[i]));
    store_n(target.data, v, n);
    for (int i = 0; i < n; ++i)
      if (fail(decode(target.data[i]) == i + 1)) printf("  store_n %s n=%d element %d\n", name, n, i);
    Guarded<T> wide(L);
    store_n(wide.data, v, n);
    for (int i = n; i < L; ++i)
      if (fail(isnan(decode(wide.data[i])))) printf("  store_n %s n=%d wrote element %d\n", name, n, i);
  }
}

int test_memory() {
  Failures fail;
  check_memory<float>("float", fail);
  check_memory<double>("double", fail);
  check_memory<bf16>("bf16", fail);
  check_memory<f16>("f16", fail);
  return fail.count;
}

template <class E>
void check_arithmetic(const char* name, Failures& fail) {
  constexpr int L = kLanes<E>;
  Random random;
  for (int round = 0; round < 1000; ++round) {
    E a[L], b[L];
    double sum = 0, largest = -INFINITY;
    for (int i = 0; i < L; ++i) {
      a[i] = static_cast<E>(random.uniform(-1, 1));
      b[i] = static_cast<E>(random.uniform(-1, 1));
      sum += a[i];
      largest = fmax(largest, a[i]);
    }
    const Vec<E> x = load(a), y = load(b), high = max(x, y), low = min(x, y), chosen = select(x < y, x, y);
    for (int i = 0; i < L; ++i)
      if (fail(high[i] == fmax(a[i], b[i]) && low[i] == fmin(a[i], b[i]) && chosen[i] == low[i]))
        printf("  max/min/select %s of %g, %g\n", name, double(a[i]), double(b[i]));
    if (fail(reduce_max(x) == largest)) printf("  reduce_max %s\n", name);
    if (fail(fabs(reduce_add(x) - sum) <= L * (sizeof(E) == 4 ? 1e-7 : 1e-15))) printf("  reduce_add %s\n", name);
  }
  const Vec<E> nan = splat(static_cast<E>(NAN)), one = splat(E{1});
  if (fail(isnan(max(one, nan)[0]) && isnan(min(one, nan)[L - 1]))) printf("  max(bound, NaN) %s lost the NaN\n", name);
  if (fail(signbit(splat(-E{0})[0]) != 0)) printf("  splat(-0) %s lost its sign\n", name);
}

int test_arithmetic() {
  Failures fail;
  check_arithmetic<float>("float", fail);
  check_arithmetic<double>("double", fail);
  return fail.count;
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(SimdTests, simd_tests) = {
    &MMK_ISA::test_conversions, &MMK_ISA::test_memory, &MMK_ISA::test_arithmetic, &MMK_ISA::test_gemm,
    &MMK_ISA::test_math,        &MMK_ISA::time_gemm,   &MMK_ISA::time_exp2,
};

}  // namespace mmk
