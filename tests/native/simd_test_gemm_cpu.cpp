// Packed matrix products of csrc/common/simd: every tile edge and layout, isolation of rows, and their speed.
#include "common/parallel.h"
#include "simd_test_cpu.h"

namespace mmk {
namespace MMK_ISA {
namespace {

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

// A source element as the multiplication sees it: bf16 operands made from a float tile are rounded.
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
  // Beyond the depth of one pass.
  const int64_t deep = 2 * kDepthBlock<T> * kWordElements<T> + 5;
  for (int accumulate = 0; accumulate < 2; ++accumulate)
    check_gemm<T, S>(name, {{MR + 2, NR + 3, deep}, 0, 0, accumulate == 1}, random, fail);
}

// A NaN or an infinity stays in its row of C, and part of the packed operands gives a valid product.
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

// A tile stored element by element at packed_a_at equals pack_a's.
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

// A [m, k] times B [n, k]^T; a task is one row tile of A against all tiles of B. C is a tile that is overwritten, as in
// a kernel that reduces it immediately.
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

}  // namespace

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

}  // namespace MMK_ISA
}  // namespace mmk
