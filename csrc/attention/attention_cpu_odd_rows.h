// Rows of a right operand that contain inf or NaN.
//
// 0 times such a row is NaN, so in a product it would reach every row of the result, even those of other samples, whose
// weight is 0 because the mask hides the pair. So it is packed as zeros and added separately to the rows with a nonzero
// weight for it.
#pragma once

#include "attention/attention_cpu_tiles.h"

namespace mmk {
namespace MMK_ISA {

template <class T>
class OddRows {
  using C = ComputeOf<T>;

 public:
  static constexpr int64_t kMost = 256;

  // pack_rows_b<S>() of up to kMost rows, with zeros for the odd rows, which are remembered until the next call.
  template <class S>
  void pack(HeadView<T> x, int64_t first, int64_t count, int64_t width, Packed<S>* dst) {
    pack_rows_b<S>(x, first, count, width, dst);
    any_ = !finite(x, first, count, width);
    if (!any_) return;
    x_ = {x.row(first), x.stride};
    width_ = width;
    for (int64_t r = 0; r < count; ++r) {
      odd_[r] = !finite(x, first + r, 1, width);
      if (!odd_[r]) continue;
      for (int64_t d = 0; d < width; ++d) *element_of_b<S>(dst, count, r, d) = Packed<S>{};
    }
  }

  // C [m, width] += A [m, k] times the odd rows among the packed rows [begin, begin + k).
  template <class S>
  void add(int64_t m, int64_t k, Packed<S>* a, int64_t begin, C* c, int64_t ldc) const {
    if (!any_) return;
    for (int64_t r = begin; r < begin + k; ++r) {
      if (!odd_[r]) continue;
      const int64_t lane = (r - begin) % kLanes<C>;
      for (int64_t i = 0; i < m; ++i) {
        const C weight = load_n(PackedRow<S>(a, k, i).at(r - begin - lane) + lane, 1)[0];
        if (weight == 0) continue;
        for (int64_t d = 0; d < width_; d += kLanes<C>) {
          const int64_t left = min64(kLanes<C>, width_ - d);
          store_n(c + i * ldc + d, load_n(c + i * ldc + d, left) + load_n(x_.row(r) + d, left) * weight, left);
        }
      }
    }
  }

 private:
  static bool finite(HeadView<T> x, int64_t first, int64_t count, int64_t width) {
    Vec<C> sum[4] = {};
    for (int64_t i = 0; i < count; i += 4)
      for (int64_t d = 0; d < width; d += kLanes<C>)
        for (int64_t r = 0; r < 4; ++r)
          sum[r] += load_n(x.row(first + min64(i + r, count - 1)) + d, min64(kLanes<C>, width - d)) * C{0};
    return reduce_add(sum[0] + sum[1] + (sum[2] + sum[3])) == 0;
  }

  // Element (r, d) of an operand B packed for `count` rows.
  template <class S>
  static Packed<S>* element_of_b(Packed<S>* b, int64_t count, int64_t r, int64_t d) {
    constexpr int64_t words = kColTile<S>, elements = kWordElements<S>;
    return b + d / words * panel_size_b<S>(count) + (r / elements * words + d % words) * elements + r % elements;
  }

  bool any_ = false, odd_[kMost] = {};
  HeadView<T> x_{};
  int64_t width_ = 0;
};

}  // namespace MMK_ISA
}  // namespace mmk
