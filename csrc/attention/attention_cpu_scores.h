// What happens to a tile of scores before pattern and bias: scale, soft cap, distances.
//
//   s_ij = scale <q_i, k_j>, or with a cap  cap tanh(scale <q_i, k_j> / cap), whose derivative is 1 - tanh^2
//   s_ij - slope_h |at_i - j|  with distances (ALiBi): at_i is the key at the position of query i
#pragma once

#include "attention/attention_cpu_extras.h"

namespace mmk {
namespace MMK_ISA {

// The soft cap of a call.
template <class C>
class SoftCap {
 public:
  SoftCap(const AttentionExtras& extras, double scale)
      : given_(extras.softcap > 0),
        cap_(static_cast<C>(extras.softcap)),
        inner_(given_ ? static_cast<C>(scale / extras.softcap) : C{0}) {}
  bool given() const { return given_; }

  // Products [rows, columns] become capped scores, in place; `slope`, if given, receives the derivatives. Rows are ld
  // apart and padded to whole vectors.
  MMK_NOINLINE void apply(C* s, C* slope, int64_t rows, int64_t columns, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = i * ld; j < i * ld + columns; j += kLanes<C>) {
        Vec<C> derivative;
        store(s + j, tanh(load(s + j) * inner_, derivative) * cap_);
        if (slope != nullptr) store(slope + j, derivative);
      }
  }

 private:
  const bool given_;
  const C cap_, inner_;
};

// The distances of a head.
template <class C>
class Distances {
  using Int = typename IntOf<C>::type;

 public:
  Distances(const AttentionExtras& extras, int64_t head)
      : at_(extras.at_q.ptr<int32_t>()), slope_(given(extras) ? extras.slopes.ptr<C>()[head] : C{0}) {}
  static bool given(const AttentionExtras& extras) { return extras.at_q.given(); }

  // |at_q - key| for a query and the lanes' keys from `key` on.
  static MMK_INLINE Vec<C> along_keys(int64_t at, int64_t key) {
    return size_of(splat(static_cast<Int>(key - at)) + count_lanes<Int>());
  }
  // |at_q - key| for the lanes' queries and a key.
  static MMK_INLINE Vec<C> along_queries(const Int* at, int64_t key) {
    return size_of(load_as<Int>(at) - static_cast<Int>(key));
  }

  // Scores [rows, columns] become scale * score - slope * distance, in place: queries from `query` on along the rows,
  // keys from `key` on along the columns.
  MMK_NOINLINE void apply(C* s, C scale, int64_t query, int64_t rows, int64_t key, int64_t columns, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes<C>) {
        C* at = s + i * ld + j;
        store(at, load(at) * scale - along_keys(at_[query + i], key + j) * slope_);
      }
  }
  // The same for a transposed tile; `at` are the queries' positions, one a column.
  MMK_NOINLINE void apply_transposed(C* s, C scale, const Int* at, int64_t key, int64_t rows, int64_t columns,
                                     int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; c += kLanes<C>) {
        C* here = s + i * ld + c;
        store(here, load(here) * scale - along_queries(at + c, key + i) * slope_);
      }
  }

 private:
  static MMK_INLINE Vec<C> size_of(Vec<Int> difference) {
    const Vec<C> x = __builtin_convertvector(difference, Vec<C>);
    return x < C{0} ? -x : x;
  }

  const int32_t* at_;
  const C slope_;
};

}  // namespace MMK_ISA
}  // namespace mmk
