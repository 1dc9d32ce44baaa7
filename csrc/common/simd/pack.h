// Packs operands of the register-blocked GEMM in the order its inner loop reads them.
//
// A word is what one lane multiplies at once: a float, a double, or (AVX512-BF16 only) two bfloat16 adjacent in k. With
// MR x NR the register tile and KB = 64 bytes of words:
//   A  [panel of MR rows][k / KB][MR][KB]   a row's words stay together, so a k-contiguous source is copied as it is
//   B  [panel of NR columns][k][NR]         so a column-contiguous source is copied as it is
// The other source orders go through an in-register transpose. Partial edges and an odd last k are zero-padded.
#pragma once

#include "common/simd/transpose.h"
#include "common/simd/vec.h"

namespace mmk {
namespace MMK_ISA {

// The element type of a packed operand: bf16 where the machine multiplies bf16, else T's compute type.
template <class T>
struct PackedType {
  using type = ComputeOf<T>;
};
#if defined(__AVX512BF16__)
template <>
struct PackedType<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Packed = typename PackedType<T>::type;

template <class P>
struct WordType {
  using type = P;
  static constexpr int elements = 1;
};
template <>
struct WordType<bf16> {
  using type = uint32_t;
  static constexpr int elements = 2;
};
template <class T>
using Word = typename WordType<Packed<T>>::type;
template <class T>
constexpr int kWordElements = WordType<Packed<T>>::elements;

// Register tile: kRowTile x kColVectors accumulators, one register per column vector of B, one for the broadcast of A.
#if defined(__AVX512F__)
constexpr int kRowTile = 12, kColVectors = 2;
#elif defined(__AVX2__)
constexpr int kRowTile = 6, kColVectors = 2;
#elif defined(__aarch64__)
constexpr int kRowTile = 8, kColVectors = 3;
#else
constexpr int kRowTile = 6, kColVectors = 2;
#endif
template <class T>
constexpr int kColTile = kColVectors * kLanes<Word<T>>;
template <class T>
constexpr int kWordBlock = 64 / static_cast<int>(sizeof(Word<T>));

MMK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
MMK_INLINE int64_t count_words(int64_t k) {
  return (k + kWordElements<T> - 1) / kWordElements<T>;
}

// Elements of Packed<T> between the starts of two panels.
template <class T>
MMK_INLINE int64_t panel_size_a(int64_t k) {
  return kRowTile * round_up(count_words<T>(k), kWordBlock<T>) * kWordElements<T>;
}
template <class T>
MMK_INLINE int64_t panel_size_b(int64_t k) {
  return kColTile<T> * count_words<T>(k) * kWordElements<T>;
}

// Elements of Packed<T> that an operand occupies, padding included.
template <class T>
MMK_INLINE int64_t packed_size_a(int64_t rows, int64_t k) {
  return round_up(rows, kRowTile) / kRowTile * panel_size_a<T>(k);
}
template <class T>
MMK_INLINE int64_t packed_size_b(int64_t cols, int64_t k) {
  return round_up(cols, kColTile<T>) / kColTile<T> * panel_size_b<T>(k);
}

namespace pack {

// A register of words from consecutive elements at p.
template <class T, class S>
MMK_INLINE Vec<Word<T>> load_words(const S* p) {
  if constexpr (kWordElements<T> == 1) {
    return load(p);
  } else if constexpr (sizeof(S) == 2) {
    return load_as<uint32_t>(p);
  } else {
#if defined(__AVX512BF16__)
    return (Vec<uint32_t>)_mm512_cvtne2ps_pbh((__m512)load(p + kLanes<float>), (__m512)load(p));
#endif
  }
}

// The same from the first n elements `stride` apart (n < 1: none); the other lanes are zeros.
template <class T, class S>
MMK_INLINE Vec<Word<T>> along_k(const S* p, int64_t stride, int64_t n) {
  constexpr int count = kLanes<Word<T>> * kWordElements<T>;
  if (stride == 1 && n >= count) return load_words<T>(p);
  S gathered[count] = {};
  for (int64_t i = 0; i < min64(n, count); ++i) gathered[i] = p[i * stride];
  return load_words<T>(gathered);
}

// The words of up to a register of adjacent rows (or columns) at one k; n of them exist. In a pair word the second
// element comes from the next k if `pair`.
template <class T, class S>
MMK_INLINE Vec<Word<T>> across_k(const S* p, int64_t k_stride, int64_t n, bool pair) {
  if constexpr (kWordElements<T> == 1) {
    (void)k_stride;
    (void)pair;
    if (n >= kLanes<Word<T>>) return load(p);
    return load_n(p, n);
  } else {
#if defined(__AVX512BF16__)
    const auto bits = [n](const S* q) {
      if constexpr (sizeof(S) == 2)
        return widen(load_half_n(q, n));
      else
        return widen((HalfVec<uint16_t>)_mm512_cvtneps_pbh((__m512)load_n(q, n)));
    };
    const auto first = bits(p);
    return pair ? first | bits(p + k_stride) << 16 : first;
#endif
  }
}

template <class T>
MMK_INLINE void store_words(Word<T>* p, Vec<Word<T>> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

}  // namespace pack

// The offset of element (row, t) of a packed A. A row's elements are contiguous from t to the next multiple of 64
// bytes, so a kernel may store a computed tile here directly, one Vec at a time with t a multiple of its lanes, instead
// of packing it in a second pass. It must then also write the zero that pads an odd k where words are pairs (store
// whole vectors, zeros past k).
template <class T>
MMK_INLINE Packed<T>* packed_a_at(Packed<T>* dst, int64_t k, int64_t row, int64_t t) {
  constexpr int64_t block = kWordBlock<T> * kWordElements<T>;
  return dst + row / kRowTile * panel_size_a<T>(k) + t / block * (kRowTile * block) + row % kRowTile * block +
         t % block;
}

// Packs A [rows, k], element (i, t) at src[i * row_stride + t * k_stride], into packed_size_a<T>(rows, k) elements.
// S is T or ComputeOf<T>; a float tile packed as bf16 is rounded to nearest even. Fast for unit stride in either
// dimension.
template <class T, class S>
void pack_a(const S* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Packed<T>* dst) {
  constexpr int L = kLanes<Word<T>>, E = kWordElements<T>, block = kWordBlock<T>;
  const int64_t words = count_words<T>(k), padded_words = round_up(words, block);
  const int64_t panel_words = kRowTile * padded_words;
  auto* panel = reinterpret_cast<Word<T>*>(dst);
  if (row_stride != 1 || k_stride == 1) {
    for (int64_t i0 = 0; i0 < rows; i0 += kRowTile, panel += panel_words)
      for (int64_t w0 = 0; w0 < padded_words; w0 += block)
        for (int r = 0; r < kRowTile; ++r) {
          Word<T>* line = panel + w0 * kRowTile + r * block;
          const S* row = src + (i0 + r) * row_stride;
#pragma GCC unroll 4
          for (int w = 0; w < block; w += L) {
            const int64_t t = (w0 + w) * E;
            pack::store_words<T>(line + w, pack::along_k<T>(row + t * k_stride, k_stride, i0 + r < rows ? k - t : 0));
          }
        }
    return;
  }
  // A register's lanes run across rows and need not align with panels.
  const int64_t padded_rows = round_up(rows, kRowTile);
  for (int64_t i0 = 0; i0 < padded_rows; i0 += L) {
    const int64_t present = rows > i0 ? min64(rows - i0, L) : 0;
    const int64_t written = min64(padded_rows - i0, L);
    Word<T>* line[L];
    for (int i = 0; i < written; ++i) line[i] = panel + (i0 + i) / kRowTile * panel_words + (i0 + i) % kRowTile * block;
    for (int64_t w0 = 0; w0 < padded_words; w0 += L) {
      Vec<Word<T>> tile[L];
      for (int t = 0; t < L; ++t) {
        const int64_t kk = (w0 + t) * E;
        // Each k is a separate stream, more than the hardware prefetcher tracks.
        for (int e = 0; e < E; ++e) __builtin_prefetch(src + i0 + (kk + L * E + e) * k_stride);
        tile[t] = kk < k && present > 0 ? pack::across_k<T>(src + i0 + kk * k_stride, k_stride, present, kk + 1 < k)
                                        : Vec<Word<T>>{};
      }
      transpose<Word<T>>(tile);
      const int64_t offset = w0 / block * (kRowTile * block) + w0 % block;
      for (int i = 0; i < written; ++i) pack::store_words<T>(line[i] + offset, tile[i]);
    }
  }
}

// Packs B [k, cols], element (t, j) at src[j * col_stride + t * k_stride], into packed_size_b<T>(cols, k) elements.
template <class T, class S>
void pack_b(const S* src, int64_t col_stride, int64_t k_stride, int64_t cols, int64_t k, Packed<T>* dst) {
  constexpr int L = kLanes<Word<T>>, E = kWordElements<T>, NR = kColTile<T>;
  const int64_t words = count_words<T>(k);
  auto* panel = reinterpret_cast<Word<T>*>(dst);
  for (int64_t j0 = 0; j0 < cols; j0 += NR, panel += NR * words) {
    if (col_stride == 1 && k_stride != 1) {
      for (int64_t w = 0; w < words; ++w)
#pragma GCC unroll 4
        for (int c = 0; c < NR; c += L) {
          const S* p = src + j0 + c + w * E * k_stride;
          const int64_t present = cols - j0 - c;
          pack::store_words<T>(
              panel + w * NR + c,
              present > 0 ? pack::across_k<T>(p, k_stride, min64(present, L), w * E + 1 < k) : Vec<Word<T>>{});
        }
      continue;
    }
    for (int64_t w0 = 0; w0 < words; w0 += L)
      for (int c = 0; c < NR; c += L) {
        const S* column = src + (j0 + c) * col_stride + w0 * E * k_stride;
        Vec<Word<T>> tile[L];
        for (int i = 0; i < L; ++i)
          tile[i] = pack::along_k<T>(column + i * col_stride, k_stride, j0 + c + i < cols ? k - w0 * E : 0);
        transpose<Word<T>>(tile);
        const int64_t written = min64(words - w0, L);
        for (int t = 0; t < written; ++t) pack::store_words<T>(panel + (w0 + t) * NR + c, tile[t]);
      }
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
