// Shared by forward and backward: operands of one head, products over part of a packed operand, scratch memory.
#pragma once

#include "attention/attention.h"
#include "attention/attention_plan.h"
#include "common/parallel.h"
#include "common/simd/gemm.h"
#include "common/simd/math.h"

namespace mmk {
namespace MMK_ISA {

// One head of a [T, heads, D] tensor: rows of unit stride.
template <class T>
struct HeadView {
  T* base;
  int64_t stride;
  T* row(int64_t t) const { return base + t * stride; }
};

template <class T>
HeadView<T> head_of(const Tensor& x, int64_t head) {
  return {x.ptr<T>() + head * x.stride[1], x.stride[0]};
}

// Four ways to pack `count` rows of a head, `width` wide, as an operand.
template <class T>
void pack_rows_a(HeadView<T> x, int64_t first, int64_t count, int64_t width, Packed<T>* dst) {  // A [rows, width]
  pack_a<T>(x.row(first), x.stride, 1, count, width, dst);
}
template <class T>
void pack_columns_b(HeadView<T> x, int64_t first, int64_t count, int64_t width, Packed<T>* dst) {  // B [width, rows]
  pack_b<T>(x.row(first), x.stride, 1, count, width, dst);
}
template <class T, class S>
void pack_rows_b(HeadView<S> x, int64_t first, int64_t count, int64_t width, Packed<T>* dst) {  // B [rows, width]
  pack_b<T>(x.row(first), 1, x.stride, width, count, dst);
}

// C [m, n] (+)= A [m, k] B[k_begin : k_begin + k, 0 : n], where A was packed for k and B for k_total.
// k_begin is a multiple of kWordElements<T>; k may end inside a word only at the end of both. One pass up to the length
// at which PyTorch's products, too, are one sequential sum, then passes of equal length.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, const Packed<T>* a, const Packed<T>* b, int64_t k_begin, int64_t k_total,
              ComputeOf<T>* c, int64_t ldc, bool accumulate) {
  constexpr int64_t most = 192;
  const int64_t words = count_words<T>(k), passes = words > most ? (words + most - 1) / most : 1;
  const int64_t depth = round_up((words + passes - 1) / passes, kWordBlock<T>);
  const auto* word_b = reinterpret_cast<const Word<T>*>(b) + k_begin / kWordElements<T> * kColTile<T>;
  gemm_panels<T>(m, n, words, depth, reinterpret_cast<const Word<T>*>(a), word_b, kColTile<T> * count_words<T>(k_total),
                 c, ldc, accumulate);
}

// sum[j] = <column j of a, column j of b>, both B [k, columns]: a sum of short sums, whose rounding errors are small.
template <class T>
void multiply_columns(int64_t columns, int64_t k, const Packed<T>* a, const Packed<T>* b, ComputeOf<T>* sum) {
  constexpr int64_t most = 16;
  const int64_t words = count_words<T>(k);
  const auto* word_a = reinterpret_cast<const Word<T>*>(a);
  const auto* word_b = reinterpret_cast<const Word<T>*>(b);
  for (int64_t j = 0; j < columns; j += kLanes<Word<T>>) {
    const int64_t at = j / kColTile<T> * (kColTile<T> * words) + j % kColTile<T>;
    Vec<ComputeOf<T>> total = {};
    for (int64_t first = 0; first < words; first += most) {
      Vec<ComputeOf<T>> part = {};
      for (int64_t w = first; w < min64(first + most, words); ++w)
        part = multiply_add(part, load_as<Word<T>>(word_a + at + w * kColTile<T>),
                            load_as<Word<T>>(word_b + at + w * kColTile<T>));
      total += part;
    }
    store(sum + j, total);
  }
}

// dst[i][d] = factor * src[i][d], rounded to T: the one cast of a gradient.
template <class T, class C = ComputeOf<T>>
void write_rows(const C* src, int64_t count, int64_t width, C factor, HeadView<T> dst, int64_t first) {
  constexpr int L = kLanes<C>;
  for (int64_t i = 0; i < count; ++i) {
    T* row = dst.row(first + i);
    for (int64_t d = 0; d < width; d += L) {
      const int64_t left = min64(L, width - d);
      store_n(row + d, load_n(src + i * width + d, left) * factor, left);
    }
  }
}

// Stores a vector of a computed tile, rounded to the packed type.
MMK_INLINE void store_packed(float* p, Vec<float> v) { store(p, v); }
MMK_INLINE void store_packed(double* p, Vec<double> v) { store(p, v); }
#if defined(__AVX512BF16__)
MMK_INLINE void store_packed(bf16* p, Vec<float> v) {
  const auto h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

// Start of row i of an A operand of depth k, and the distance of its 64-byte blocks.
template <class T>
struct PackedRow {
  static constexpr int64_t block = kWordBlock<T> * kWordElements<T>;  // elements
  static constexpr int64_t step = kRowTile * block;

  Packed<T>* first;

  PackedRow(Packed<T>* operand, int64_t k, int64_t i)
      : first(operand + i / kRowTile * panel_size_a<T>(k) + i % kRowTile * block) {}
  // Columns [j, j + lanes) of the row; j is a multiple of the lanes.
  MMK_INLINE Packed<T>* at(int64_t j) const { return first + j / block * step + j % block; }
};

// 0, 1, 2, ...
template <class Int>
MMK_INLINE Vec<Int> count_lanes() {
  Vec<Int> v;
  for (int i = 0; i < kLanes<Int>; ++i) v[i] = i;
  return v;
}

// Hands out 64-byte aligned slices of one block; with a null block it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class E>
  E* take(int64_t count) {
    E* slice = reinterpret_cast<E*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return base_ == nullptr ? nullptr : slice;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Sizes of one call.
struct AttentionShape {
  int64_t num_queries, num_keys, heads, kv_heads, dim, dim_v;

  template <class Args>
  explicit AttentionShape(const Args& args)
      : num_queries(args.q.size[0]),
        num_keys(args.k.size[0]),
        heads(args.q.size[1]),
        kv_heads(args.k.size[1]),
        dim(args.q.size[2]),
        dim_v(args.v.size[2]) {}
  int64_t group() const { return heads / kv_heads; }
};

// Tiles per task: enough to amortise packing the keys, few enough to keep every thread busy.
constexpr int64_t kTilesPerTask = 4;

static inline int64_t tiles_per_task(int64_t tiles, int64_t heads, int num_threads) {
  const int64_t share = tiles * heads / (4 * static_cast<int64_t>(num_threads));
  return share < 1 ? 1 : min64(share, kTilesPerTask);
}

}  // namespace MMK_ISA
}  // namespace mmk
