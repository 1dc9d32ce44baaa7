// Tests of csrc/common/simd for the instruction set it is compiled for. Like every *_cpu.cpp file it uses no std::
// container or function, so that test_simd.py can also assert that its objects leak no symbol out of their namespace.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "common/parallel.h"
#include "common/simd/gemm.h"
#include "common/simd/math.h"
#include "simd_test.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// ---- helpers --------------------------------------------------------------------------------------------------------

struct Failures {
  int count = 0;
  bool operator()(bool ok) {
    if (!ok) ++count;
    return !ok && count <= 5;  // true: print this one
  }
};

// An array that ends at an unmapped page: an access past its end is a crash, not luck. Starts as all-ones bytes, which
// are NaN in every floating-point type.
template <class T>
struct Guarded {
  explicit Guarded(int64_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    used = (static_cast<size_t>(count) * sizeof(T) + page - 1) / page * page;
    base = static_cast<char*>(mmap(nullptr, used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + used, page, PROT_NONE) != 0) abort();
    memset(base, 0xff, used);
    data = reinterpret_cast<T*>(base + used) - count;
    mapped = used + page;
  }
  ~Guarded() { munmap(base, mapped); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  // Whether all that lies before the array still is as it was.
  bool front_untouched() const {
    for (const char* p = base; p < reinterpret_cast<const char*>(data); ++p)
      if (*p != '\xff') return false;
    return true;
  }
  char* base;
  size_t used, mapped;
  T* data;
};

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  double uniform(double low, double high) { return low + (high - low) * (bits() * 0x1p-32); }
};

// Scalar references, by arithmetic in double instead of bit tricks. `bits` and `bias` describe the 16-bit format.
double decode(uint16_t h, int mantissa_bits, int bias) {
  const int exponent = (h & 0x7fff) >> mantissa_bits, mantissa = h & ((1 << mantissa_bits) - 1);
  const int all_ones = (1 << (15 - mantissa_bits)) - 1;
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == all_ones) return mantissa ? static_cast<double>(NAN) : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

uint16_t encode(double x, int mantissa_bits, int bias) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const int infinity = ((1 << (15 - mantissa_bits)) - 1) << mantissa_bits;
  const double a = fabs(x);
  if (isinf(a)) return static_cast<uint16_t>(sign | infinity);
  int exponent = 1 - bias;
  if (a > 0) {
    int e;
    frexp(a, &e);
    if (e - 1 > exponent) exponent = e - 1;
  }
  const double steps = nearbyint(ldexp(a, mantissa_bits - exponent));  // to nearest even
  const double code = steps + ldexp(exponent + bias - 1, mantissa_bits);
  return static_cast<uint16_t>(sign | (code > infinity ? infinity : static_cast<int>(code)));
}

double decode(bf16 h) { return decode(h.bits, 7, 127); }
double decode(f16 h) { return decode(h.bits, 10, 15); }
double decode(float x) { return x; }
double decode(double x) { return x; }
void encode(double x, bf16& h) { h.bits = encode(x, 7, 127); }
void encode(double x, f16& h) { h.bits = encode(x, 10, 15); }
void encode(double x, float& y) { y = static_cast<float>(x); }
void encode(double x, double& y) { y = x; }

bool same(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }

// ---- conversions and memory -----------------------------------------------------------------------------------------

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

// ---- arithmetic -----------------------------------------------------------------------------------------------------

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

// ---- GEMM -----------------------------------------------------------------------------------------------------------

// Strides of an operand [outer, k]: contiguous in k, contiguous in the other dimension, or in neither.
struct Layout {
  int64_t outer_stride, k_stride, size;
};
Layout layout(int kind, int64_t outer, int64_t k) {
  if (outer == 0 || k == 0) return {1, 1, 0};
  const int64_t pad = 3;
  if (kind == 0) return {k + pad, 1, (outer - 1) * (k + pad) + k};
  if (kind == 1) return {1, outer + pad, (k - 1) * (outer + pad) + outer};
  return {2 * k, 2, (outer - 1) * 2 * k + (k - 1) * 2 + 1};
}

// What the multiplication sees of a source element: bf16 operands made of a float tile are rounded.
template <class T, class S>
double operand(S x) {
  if constexpr (kWordElements<T> == 2) {
    bf16 rounded;
    encode(decode(x), rounded);
    return decode(rounded);
  }
  return decode(x);
}

struct Case {
  GemmShape shape;
  int kind_a, kind_b;
  bool accumulate;
};

template <class T, class S>
void check_gemm(const char* name, Case c, Random& random, Failures& fail) {
  using C = ComputeOf<T>;
  const auto [m, n, k] = c.shape;
  const Layout la = layout(c.kind_a, m, k), lb = layout(c.kind_b, n, k);
  Guarded<S> a(la.size), b(lb.size);
  for (int64_t i = 0; i < la.size; ++i) encode(random.uniform(-1, 1), a.data[i]);
  for (int64_t i = 0; i < lb.size; ++i) encode(random.uniform(-1, 1), b.data[i]);
  Guarded<Packed<T>> packed_a(packed_size_a<T>(m, k)), packed_b(packed_size_b<T>(n, k));
  pack_a<T>(a.data, la.outer_stride, la.k_stride, m, k, packed_a.data);
  pack_b<T>(b.data, lb.outer_stride, lb.k_stride, n, k, packed_b.data);

  const int64_t ldc = n + 5;
  Guarded<C> out(m > 0 ? (m - 1) * ldc + n : 0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n && c.accumulate; ++j) out.data[i * ldc + j] = 2;
  gemm_packed<T>(m, n, k, packed_a.data, packed_b.data, out.data, ldc, c.accumulate);

  const double epsilon = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < (i + 1 < m ? ldc : n); ++j) {
      const double got = out.data[i * ldc + j];
      if (j >= n) {
        if (fail(isnan(got))) printf("  %s wrote column %ld of %ld\n", name, long(j), long(n));
        continue;
      }
      long double sum = c.accumulate ? 2 : 0, size = sum;
      for (int64_t t = 0; t < k; ++t) {
        const long double term = static_cast<long double>(operand<T>(a.data[i * la.outer_stride + t * la.k_stride])) *
                                 operand<T>(b.data[j * lb.outer_stride + t * lb.k_stride]);
        sum += term;
        size += fabsl(term);
      }
      const double bound = static_cast<double>(2 * (k + 2) * epsilon * size);  // any order, products rounded too
      if (fail(fabs(got - static_cast<double>(sum)) <= bound))
        printf("  %s m=%ld n=%ld k=%ld layouts %d,%d accumulate=%d at [%ld,%ld]: %.9g, expected %.9g\n", name, long(m),
               long(n), long(k), c.kind_a, c.kind_b, c.accumulate, long(i), long(j), got, static_cast<double>(sum));
    }
  if (fail(packed_a.front_untouched() && packed_b.front_untouched() && out.front_untouched()))
    printf("  %s wrote before its buffer\n", name);
}

template <class T, class S>
void check_gemms(const char* name, Failures& fail) {
  constexpr int64_t MR = kRowTile, NR = kColTile<T>, KB = kWordBlock<T> * kWordElements<T>;
  const int64_t rows[] = {0, 1, MR - 1, MR, MR + 1, 2 * MR + 5}, cols[] = {0, 1, NR - 1, NR, NR + 1, 2 * NR + 3};
  const int64_t depths[] = {0, 1, 2, 3, KB - 1, KB, KB + 1, 2 * KB + 7};
  Random random;
  for (int64_t m : rows)
    for (int64_t n : cols)
      for (int64_t k : depths)
        for (int kinds = 0; kinds < 9; ++kinds)
          check_gemm<T, S>(name, {{m, n, k}, kinds / 3, kinds % 3, (m + n + k) % 2 == 0}, random, fail);
  // Past the depth that one pass covers.
  const int64_t deep = 2 * kDepthBlock<T> * kWordElements<T> + 5;
  for (int accumulate = 0; accumulate < 2; ++accumulate)
    check_gemm<T, S>(name, {{MR + 2, NR + 3, deep}, 0, 0, accumulate == 1}, random, fail);
}

// A NaN or an infinity stays in its row of C, and a part of the packed operands is a product of its own.
template <class T>
void check_isolation(const char* name, Failures& fail) {
  constexpr int64_t MR = kRowTile, NR = kColTile<T>, m = 2 * MR, n = 2 * NR, k = 19;
  Guarded<T> a(m * k), b(n * k);
  Random random;
  for (int64_t i = 0; i < m * k; ++i) encode(random.uniform(-1, 1), a.data[i]);
  for (int64_t i = 0; i < n * k; ++i) encode(random.uniform(0.5, 1), b.data[i]);
  encode(INFINITY, a.data[(MR + 1) * k]);
  Guarded<Packed<T>> packed_a(packed_size_a<T>(m, k)), packed_b(packed_size_b<T>(n, k));
  pack_a<T>(a.data, k, 1, m, k, packed_a.data);
  pack_b<T>(b.data, k, 1, n, k, packed_b.data);
  Guarded<ComputeOf<T>> whole(m * n), part(MR * NR);
  gemm_packed<T>(m, n, k, packed_a.data, packed_b.data, whole.data, n, false);
  gemm_packed<T>(MR, NR, k, packed_a.data + panel_size_a<T>(k), packed_b.data + panel_size_b<T>(k), part.data, NR,
                 false);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double x = whole.data[i * n + j];
      if (fail(i == MR + 1 ? isinf(x) && x > 0 : isfinite(x) != 0))
        printf("  %s [%ld,%ld] = %g\n", name, long(i), long(j), x);
      if (i >= MR && j >= NR && fail(part.data[(i - MR) * NR + j - NR] == x)) printf("  %s: part differs\n", name);
    }
}

// A tile stored element by element at packed_a_at is the tile that pack_a makes.
template <class T>
void check_packed_a_at(const char* name, Failures& fail) {
  using C = ComputeOf<T>;
  constexpr int64_t L = kLanes<C>, rows = 2 * kRowTile + 1, k = 5 * L;
  Guarded<C> tile(rows * k);
  Random random;
  for (int64_t i = 0; i < rows * k; ++i) tile.data[i] = static_cast<C>(random.uniform(-1, 1));
  Guarded<Packed<T>> packed(packed_size_a<T>(rows, k)), stored(packed_size_a<T>(rows, k));
  pack_a<T>(tile.data, k, 1, rows, k, packed.data);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < k; t += L) store(packed_a_at<T>(stored.data, k, i, t), load(tile.data + i * k + t));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < k; ++t) {
      const double want = decode(*packed_a_at<T>(packed.data, k, i, t));
      const double got = decode(*packed_a_at<T>(stored.data, k, i, t));
      const double close = sizeof(Packed<T>) == 2 ? 0x1p-8 : 0;
      if (fail(got == want && fabs(got - static_cast<double>(tile.data[i * k + t])) <= close))
        printf("  packed_a_at %s [%ld,%ld]: %g, expected %g\n", name, long(i), long(t), got, want);
    }
}

int test_gemm() {
  Failures fail;
  check_packed_a_at<float>("float", fail);
  check_packed_a_at<double>("double", fail);
  check_packed_a_at<bf16>("bf16", fail);
  check_packed_a_at<f16>("f16", fail);
  check_gemms<float, float>("float", fail);
  check_gemms<double, double>("double", fail);
  check_gemms<bf16, bf16>("bf16", fail);
  check_gemms<f16, f16>("f16", fail);
  check_gemms<bf16, float>("bf16 from float", fail);
  check_gemms<f16, float>("f16 from float", fail);
  check_isolation<float>("float", fail);
  check_isolation<double>("double", fail);
  check_isolation<bf16>("bf16", fail);
  check_isolation<f16>("f16", fail);
  return fail.count;
}

// ---- math -----------------------------------------------------------------------------------------------------------

template <class E>
using Unary = Vec<E> (*)(Vec<E>);
using Exact = long double (*)(long double);

template <class E>
double ulp_of(long double y) {
  int e;
  frexpl(fabsl(y), &e);
  return ldexp(1.0, e - 1 - FloatTraits<E>::mantissa_bits);
}

// The largest error over a sweep must stay within `bound` ulp; results below the normal range must be 0 (or within it).
template <class E>
void sweep(const char* name, Unary<E> f, Exact exact, double low, double high, bool by_exponent, double bound,
           Failures& fail) {
  constexpr int L = kLanes<E>;
  Random random;
  double worst = 0, worst_x = 0;
  for (int round = 0; round < 400000 / L; ++round) {
    E x[L], y[L];
    for (int i = 0; i < L; ++i) {
      const double u = random.uniform(low, high);
      x[i] = static_cast<E>(by_exponent ? ::exp2(u) : u);
    }
    store(y, f(load(x)));
    for (int i = 0; i < L; ++i) {
      const long double want = exact(static_cast<long double>(x[i]));
      if (fabsl(want) < static_cast<long double>(FloatTraits<E>::smallest_normal)) {
        const bool ok = y[i] == 0 || fabsl(y[i] - want) <= bound * ulp_of<E>(FloatTraits<E>::smallest_normal);
        if (fail(ok)) printf("  %s(%a) = %a, expected 0\n", name, double(x[i]), double(y[i]));
        continue;
      }
      const double error = static_cast<double>(fabsl(y[i] - want)) / ulp_of<E>(want);
      if (!(error <= worst)) worst = error, worst_x = x[i];
    }
  }
  printf("  %s<%s> on [%g, %g]: %.2f ulp\n", name, sizeof(E) == 4 ? "float" : "double", low, high, worst);
  if (fail(worst <= bound)) printf("  ... at %a, bound %g\n", worst_x, bound);
}

template <class E>
void check_special(const char* name, Unary<E> f, double x, double want, Failures& fail) {
  const double got = f(splat(static_cast<E>(x)))[kLanes<E> - 1];
  if (fail(isnan(want) ? isnan(got) != 0 : got == want)) printf("  %s(%g) = %g, expected %g\n", name, x, got, want);
}

template <class E>
void check_math(Failures& fail) {
  const bool wide = sizeof(E) == 8;
  const double low = wide ? -1022 : -126, high = wide ? 1024 : 128, ln2 = 0.69314718055994530942;
  const Unary<E> f_exp2 = [](Vec<E> x) { return exp2(x); }, f_exp = [](Vec<E> x) { return exp(x); },
                 f_log2 = [](Vec<E> x) { return log2(x); }, f_log2_1p = [](Vec<E> x) { return log2_1p(x); },
                 f_log_sigmoid = [](Vec<E> x) { return log_sigmoid(x); }, f_tanh = [](Vec<E> x) { return tanh(x); };
  const Exact log2_1pl = [](long double x) { return log1pl(x) * 1.44269504088896340736L; };
  const Exact log_sigmoidl = [](long double x) { return x < 0 ? x - log1pl(expl(x)) : -log1pl(expl(-x)); };

  sweep<E>("exp2", f_exp2, exp2l, low - 2, high, false, 1.25, fail);
  sweep<E>("exp2", f_exp2, exp2l, -2, 2, false, 1.25, fail);
  sweep<E>("exp", f_exp, expl, (low - 2) * ln2, high * ln2 * (1 - 1e-7), false, 1.5, fail);
  sweep<E>("exp", f_exp, expl, -2, 2, false, 1.5, fail);
  sweep<E>("log2 of 2^x", f_log2, log2l, low - 20, high - 1e-6, true, 1.25, fail);  // from subnormals on
  sweep<E>("log2 of 2^x", f_log2, log2l, -1, 1, true, 1.25, fail);
  sweep<E>("log2", f_log2, log2l, 0.999, 1.001, false, 1.25, fail);
  sweep<E>("log2_1p", f_log2_1p, log2_1pl, 0, 1, false, 1.25, fail);
  sweep<E>("log2_1p of 2^x", f_log2_1p, log2_1pl, low, 0, true, 1.25, fail);
  sweep<E>("log_sigmoid", f_log_sigmoid, log_sigmoidl, -100, 100, false, 2.5, fail);
  sweep<E>("log_sigmoid", f_log_sigmoid, log_sigmoidl, -1, 1, false, 2.5, fail);
  sweep<E>("tanh", f_tanh, tanhl, -1, 1, false, 2, fail);
  sweep<E>("tanh", f_tanh, tanhl, -30, 30, false, 2, fail);
  sweep<E>("tanh of 2^x", f_tanh, tanhl, low / 2, high - 1e-6, true, 2, fail);

  for (Unary<E> f : {f_exp2, f_exp}) {
    check_special<E>("exp", f, -INFINITY, 0, fail);
    check_special<E>("exp", f, INFINITY, INFINITY, fail);
    check_special<E>("exp", f, NAN, NAN, fail);
    check_special<E>("exp", f, 0, 1, fail);
    check_special<E>("exp", f, -0.0, 1, fail);
    check_special<E>("exp", f, 1e30, INFINITY, fail);
    check_special<E>("exp", f, -1e30, 0, fail);
  }
  check_special<E>("exp2", f_exp2, high, INFINITY, fail);
  check_special<E>("exp2", f_exp2, low, FloatTraits<E>::smallest_normal, fail);
  for (int n = static_cast<int>(low); n < high; ++n) check_special<E>("exp2", f_exp2, n, ldexp(1, n), fail);
  for (int n = static_cast<int>(low) - 20; n < high; ++n) check_special<E>("log2", f_log2, ldexp(1, n), n, fail);
  check_special<E>("log2", f_log2, 0, -INFINITY, fail);
  check_special<E>("log2", f_log2, -0.0, -INFINITY, fail);
  check_special<E>("log2", f_log2, INFINITY, INFINITY, fail);
  for (double x : {-1.0, -static_cast<double>(INFINITY), static_cast<double>(NAN)})
    check_special<E>("log2", f_log2, x, NAN, fail);
  check_special<E>("log2_1p", f_log2_1p, 0, 0, fail);
  check_special<E>("log2_1p", f_log2_1p, 1, 1, fail);
  check_special<E>("log2_1p", f_log2_1p, NAN, NAN, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, INFINITY, 0, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, -INFINITY, -INFINITY, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, NAN, NAN, fail);
  check_special<E>("tanh", f_tanh, INFINITY, 1, fail);
  check_special<E>("tanh", f_tanh, -INFINITY, -1, fail);
  check_special<E>("tanh", f_tanh, NAN, NAN, fail);
  check_special<E>("tanh", f_tanh, 0, 0, fail);
}

int test_math() {
  Failures fail;
  check_math<float>(fail);
  check_math<double>(fail);
  return fail.count;
}

// ---- timing ---------------------------------------------------------------------------------------------------------

// Time that this thread has run: other programs on the machine do not count, so that a busy machine can be used.
double thread_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// A [m, k] times B [n, k]^T, a task being one row tile of A against all tiles of B; C is a tile that is overwritten, as
// in a kernel that reduces it at once.
template <class T>
double time_gemm_of(GemmShape problem, GemmShape tile, bool with_packing, int threads) {
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  AlignedBuffer<T> a(m * k), b(n * k);
  Random random;
  for (int64_t i = 0; i < m * k; ++i) encode(random.uniform(-1, 1), a.data()[i]);
  for (int64_t i = 0; i < n * k; ++i) encode(random.uniform(-1, 1), b.data()[i]);
  const int64_t size_a = packed_size_a<T>(tile.m, k), size_b = packed_size_b<T>(tile.n, k), size_c = tile.m * tile.n;
  AlignedBuffer<Packed<T>> packed_a(size_a * threads), packed_b(size_b * threads);
  AlignedBuffer<ComputeOf<T>> c(size_c * threads);
  for (int t = 0; t < threads && !with_packing; ++t) {
    pack_a<T>(a.data(), k, 1, tile.m, k, packed_a.data() + t * size_a);
    pack_b<T>(b.data(), k, 1, tile.n, k, packed_b.data() + t * size_b);
  }
  AlignedBuffer<double> busy(threads);
  for (int t = 0; t < threads; ++t) busy.data()[t] = 0;
  parallel_for((m + tile.m - 1) / tile.m, threads, [&](int64_t task, int thread) {
    const double start = thread_time();
    auto* pa = packed_a.data() + thread * size_a;
    auto* pb = packed_b.data() + thread * size_b;
    const int64_t i0 = task * tile.m, rows = min64(tile.m, m - i0);
    if (with_packing) pack_a<T>(a.data() + i0 * k, k, 1, rows, k, pa);
    for (int64_t j0 = 0; j0 < n; j0 += tile.n) {
      const int64_t cols = min64(tile.n, n - j0);
      if (with_packing) pack_b<T>(b.data() + j0 * k, k, 1, cols, k, pb);
      gemm_packed<T>(rows, cols, k, pa, pb, c.data() + thread * size_c, tile.n, false);
    }
    busy.data()[thread] += thread_time() - start;
  });
  double total = 0;
  for (int t = 0; t < threads; ++t) total += busy.data()[t];
  return total / threads;
}

double time_gemm(DType dtype, GemmShape problem, GemmShape tile, bool with_packing, int threads) {
  switch (dtype) {
    case DType::f32:
      return time_gemm_of<float>(problem, tile, with_packing, threads);
    case DType::f64:
      return time_gemm_of<double>(problem, tile, with_packing, threads);
    case DType::bf16:
      return time_gemm_of<bf16>(problem, tile, with_packing, threads);
    case DType::f16:
      return time_gemm_of<f16>(problem, tile, with_packing, threads);
  }
  return 0;
}

double time_exp2(int64_t n) {
  constexpr int64_t kBlock = 4096;  // in L1
  AlignedBuffer<float> x(kBlock);
  for (int64_t i = 0; i < kBlock; ++i) x.data()[i] = -0.001f * static_cast<float>(i);
  const double start = thread_time();
  for (int64_t done = 0; done < n; done += kBlock)
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) store(x.data() + i, -exp2(load(x.data() + i)));
  return thread_time() - start;
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(SimdTests, simd_tests) = {
    &MMK_ISA::test_conversions, &MMK_ISA::test_memory, &MMK_ISA::test_arithmetic, &MMK_ISA::test_gemm,
    &MMK_ISA::test_math,        &MMK_ISA::time_gemm,   &MMK_ISA::time_exp2,
};

}  // namespace mmk
