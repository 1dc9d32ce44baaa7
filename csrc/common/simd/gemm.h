// C (+)= A * B on packed operands (pack.h): one register tile of accumulators per MR x NR block of C.
//
// Loops, outside in: NR columns, k in blocks whose B panel stays in L1 like C's columns, MR rows. The caller chooses
// tiles of A, B and C that together fit in L2 (assume 1 MiB).
#pragma once

#include "common/simd/pack.h"

namespace mmk {
namespace MMK_ISA {

// Words of k per pass, in whole blocks of A. A pass ends by adding its sums to C, which costs about ten steps. Shorter
// partial sums have smaller rounding errors. Words of two bf16, whose own rounding is far coarser, use longer passes.
template <class T>
constexpr int64_t kDepthBlock = (kWordElements<T> > 1 ? 256 : 128) / kWordBlock<T> * kWordBlock<T>;

MMK_INLINE Vec<float> multiply_add(Vec<float> acc, Vec<float> a, Vec<float> b) { return acc + a * b; }
MMK_INLINE Vec<double> multiply_add(Vec<double> acc, Vec<double> a, Vec<double> b) { return acc + a * b; }
#if defined(__AVX512BF16__)
MMK_INLINE Vec<float> multiply_add(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

// One tile of C: rows x cols of it are written, rows <= kRows <= kRowTile, cols <= kVectors * lanes <= kColTile.
template <class T, int kRows, int kVectors>
void multiply_tile(int64_t words, const Word<T>* a, const Word<T>* b, ComputeOf<T>* c, int64_t ldc, int64_t rows,
                   int64_t cols, bool accumulate) {
  using C = ComputeOf<T>;
  constexpr int L = kLanes<C>, block = kWordBlock<T>;
  Vec<C> acc[kRows][kVectors] = {};
  for (int64_t w0 = 0; w0 < words; w0 += block, a += block * kRowTile) {
    const int64_t depth = min64(words - w0, block);
    for (int64_t w = 0; w < depth; ++w, b += kColTile<T>) {
      Vec<Word<T>> column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = load_as<Word<T>>(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Word<T> scalar;  // memcpy, because a pair of bf16 may have been stored as such
        __builtin_memcpy(&scalar, a + r * block + w, sizeof scalar);
        const Vec<Word<T>> row = splat(scalar);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(acc[r][v], row, column[v]);
      }
    }
  }

  const bool full = rows == kRows && cols == kVectors * L;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      C* p = c + r * ldc + v * L;
      if (full) {
        store(p, accumulate ? load(p) + acc[r][v] : acc[r][v]);
      } else if (r < rows && v * L < cols) {
        const int64_t n = min64(cols - v * L, L);
        store_n(p, accumulate ? load_n(p, n) + acc[r][v] : acc[r][v], n);
      }
    }
}

// Picks the smallest tile, in steps of kRowStep rows and one vector, that covers rows x cols, so that a partial tile (a
// few rows, a head dim of 72 or 80) costs little more than its own arithmetic.
constexpr int kRowStep = kRowTile % 3 == 0 ? kRowTile / 3 : kRowTile / 2;

template <class T, int kRows, int kVectors>
MMK_INLINE void multiply_edge(int64_t words, const Word<T>* a, const Word<T>* b, ComputeOf<T>* c, int64_t ldc,
                              int64_t rows, int64_t cols, bool accumulate) {
  if constexpr (kVectors > 1)
    if (cols <= (kVectors - 1) * kLanes<ComputeOf<T>>)
      return multiply_edge<T, kRows, kVectors - 1>(words, a, b, c, ldc, rows, cols, accumulate);
  if constexpr (kRows > kRowStep)
    if (rows <= kRows - kRowStep)
      return multiply_edge<T, kRows - kRowStep, kVectors>(words, a, b, c, ldc, rows, cols, accumulate);
  multiply_tile<T, kRows, kVectors>(words, a, b, c, ldc, rows, cols, accumulate);
}

// C [m, n] (row-major, row stride ldc) = A [m, words] * B [words, n], or += if `accumulate`. A pass takes `depth`
// words, a multiple of kWordBlock<T>; panels of B are stride_b words apart.
template <class T>
void gemm_panels(int64_t m, int64_t n, int64_t words, int64_t depth, const Word<T>* a, const Word<T>* b,
                 int64_t stride_b, ComputeOf<T>* c, int64_t ldc, bool accumulate) {
  const int64_t stride_a = kRowTile * round_up(words, kWordBlock<T>);
  for (int64_t j = 0; j < n; j += kColTile<T>) {
    int64_t w0 = 0;
    do {  // at least once: no words write zeros
      for (int64_t i = 0; i < m; i += kRowTile)
        multiply_edge<T, kRowTile, kColVectors>(min64(words - w0, depth), a + i / kRowTile * stride_a + w0 * kRowTile,
                                                b + j / kColTile<T> * stride_b + w0 * kColTile<T>, c + i * ldc + j, ldc,
                                                min64(m - i, kRowTile), min64(n - j, kColTile<T>),
                                                accumulate || w0 > 0);
      w0 += depth;
    } while (w0 < words);
  }
}

// C [m, n] (+)= A [m, k] * B [k, n]. Accumulates in ComputeOf<T>. a and b must be packed for exactly this k. To use a
// part of them, start a at a multiple of kRowTile rows (panel_size_a<T>(k) elements each) and b at a multiple of
// kColTile<T> columns.
template <class T>
void gemm_packed(int64_t m, int64_t n, int64_t k, const Packed<T>* a, const Packed<T>* b, ComputeOf<T>* c, int64_t ldc,
                 bool accumulate) {
  const int64_t words = count_words<T>(k);
  gemm_panels<T>(m, n, words, kDepthBlock<T>, reinterpret_cast<const Word<T>*>(a), reinterpret_cast<const Word<T>*>(b),
                 kColTile<T> * words, c, ldc, accumulate);
}

}  // namespace MMK_ISA
}  // namespace mmk
