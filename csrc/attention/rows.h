// Shared by the row-wise kernels (rope, gate): vectors along a row, strips of rows, sums over strips.
#pragma once

#include "common/parallel.h"
#include "common/simd/math.h"

namespace mmk {
namespace MMK_ISA {

// Calls f(i, count) for [0, n) in whole vectors (count is a compile-time constant there) and one partial vector.
template <class C, class F>
MMK_INLINE void each_vector(int64_t n, F&& f) {
  constexpr int64_t L = kLanes<C>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, L);
  if (i < n) f(i, n - i);
}

// Loads `count` elements at p, zeros past them; and stores them.
template <class T>
MMK_INLINE Vec<ComputeOf<T>> read(const T* p, int64_t count) {
  return count == kLanes<ComputeOf<T>> ? load(p) : load_n(p, count);
}
template <class T>
MMK_INLINE void write(T* p, Vec<ComputeOf<T>> v, int64_t count) {
  if (count == kLanes<ComputeOf<T>>) {
    store(p, v);
  } else {
    store_n(p, v, count);
  }
}

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Splits rows into strips whose length depends only on the sizes, so that the order of sums does not depend on the
// number of threads.
struct Strips {
  int64_t rows, length;

  // Strips of about `elements` elements.
  Strips(int64_t num_rows, int64_t width, int64_t elements)
      : rows(num_rows), length(elements / (width > 0 ? width : 1)) {
    if (length < 1) length = 1;
  }
  int64_t count() const { return (rows + length - 1) / length; }
  int64_t begin(int64_t strip) const { return strip * length; }
  int64_t end(int64_t strip) const { return begin(strip) + length < rows ? begin(strip) + length : rows; }
};

// Column sums over many rows, nearly pairwise: `part` collects kRowsPerPart rows and is then added to `total`.
constexpr int64_t kRowsPerPart = 16;

template <class C>
MMK_INLINE void add_part(C* part, C* total, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    total[i] += part[i];
    part[i] = 0;
  }
}

// out[i] = sum over strips of lines[strip * stride + i], in double, in the strips' order.
template <class Line, class C>
void sum_lines(const Line* lines, int64_t strips, int64_t stride, int64_t width, C* out) {
  AlignedBuffer<double> total(width);
  for (int64_t i = 0; i < width; ++i) total.data()[i] = 0;
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t i = 0; i < width; ++i) total.data()[i] += static_cast<double>(lines[s * stride + i]);
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<C>(total.data()[i]);
}

}  // namespace MMK_ISA
}  // namespace mmk
