// Sums of rows in memory order: blocks of kBlockRows rows are added plainly, and blocks are added to the total with
// compensated summation (Neumaier), so the error does not grow with the number of rows.
#pragma once

#include "packing/packing_rows.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kBlockRows = 16;

// total + carry [width] += from [width], exactly up to the rounding of the carry.
template <class C>
MMK_INLINE void add_carrying(const C* from, int64_t width, C* total, C* carry) {
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    const auto old = load_n(total + e, n), more = load_n(from + e, n);
    const auto sum = old + more, rounded = sum - old;
    store_n(carry + e, load_n(carry + e, n) + ((old - (sum - rounded)) + (more - rounded)), n);
    store_n(total + e, sum, n);
  }
}

// total [width] += carry [width]; an infinite total, whose carry is NaN, is unchanged.
template <class C>
MMK_INLINE void settle_carry(const C* carry, int64_t width, C* total) {
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    const auto sum = load_n(total + e, n), rest = load_n(carry + e, n);
    store_n(total + e, rest == rest ? sum + rest : sum, n);
  }
}

// Terms of a sum: the rows, or rows times weights.
struct Plain {
  template <class V>
  MMK_INLINE V operator()(int64_t, V v) const {
    return v;
  }
};
template <class C>
struct Weighted {
  const C* weights;
  MMK_INLINE Vec<C> operator()(int64_t r, Vec<C> v) const { return v * splat(weights[r]); }
};

// total [width] = sum of term(r, row(r)) over r < count in the compute type. scratch holds 2 * width.
template <class T, class Row, class Term>
MMK_INLINE void sum_rows(int64_t count, int64_t width, Row row, Term term, ComputeOf<T>* scratch, ComputeOf<T>* total) {
  using C = ComputeOf<T>;
  constexpr int kL = kLanes<C>;
  C *block = scratch, *carry = scratch + width;
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(C);
  __builtin_memset(total, 0, row_bytes);
  __builtin_memset(carry, 0, row_bytes);
  for (int64_t b = 0; b < count; b += kBlockRows) {
    const int64_t end = least(count, b + kBlockRows);
    __builtin_memset(block, 0, row_bytes);
    int64_t r = b;
    for (; r + 4 <= end; r += 4) {
      const T *x0 = row(r), *x1 = row(r + 1), *x2 = row(r + 2), *x3 = row(r + 3);
      // Prefetch explicitly: four short streams at once defeat the hardware prefetcher.
      const T *y0 = row(least(r + 4, count - 1)), *y1 = row(least(r + 5, count - 1));
      const T *y2 = row(least(r + 6, count - 1)), *y3 = row(least(r + 7, count - 1));
      int64_t e = 0;
      for (; e + kL <= width; e += kL) {
        __builtin_prefetch(y0 + e), __builtin_prefetch(y1 + e), __builtin_prefetch(y2 + e), __builtin_prefetch(y3 + e);
        const auto four = (term(r, load(x0 + e)) + term(r + 1, load(x1 + e))) +
                          (term(r + 2, load(x2 + e)) + term(r + 3, load(x3 + e)));
        store(block + e, load(block + e) + four);
      }
      if (const int64_t n = width - e; n > 0) {
        const auto four = (term(r, load_n(x0 + e, n)) + term(r + 1, load_n(x1 + e, n))) +
                          (term(r + 2, load_n(x2 + e, n)) + term(r + 3, load_n(x3 + e, n)));
        store_n(block + e, load_n(block + e, n) + four, n);
      }
    }
    for (; r < end; ++r) {
      const T* x = row(r);
      for (int64_t e = 0; e < width; e += kL) {
        const int64_t n = least(kL, width - e);
        store_n(block + e, load_n(block + e, n) + term(r, load_n(x + e, n)), n);
      }
    }
    add_carrying(block, width, total, carry);
  }
  settle_carry(carry, width, total);
}

// to [width] = from [width] / divisor, rounded to T.
template <class T>
MMK_INLINE void round_row(const ComputeOf<T>* from, ComputeOf<T> divisor, int64_t width, T* to) {
  using C = ComputeOf<T>;
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    store_n(to + e, load_n(from + e, n) / splat(divisor), n);
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
