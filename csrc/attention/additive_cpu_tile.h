// Shared by forward and backward of additive attention on the CPU: sizes, the mask, a key tile and its scores.
//
// Vectors run along the keys: a tile of kKeys keys is transposed once and scored query by query, with one tanh per key
// and element of the head dim. Everything is in the compute type.
#pragma once

#include "attention/additive.h"
#include "attention/rows.h"

namespace mmk {
namespace MMK_ISA {
namespace additive {

constexpr int64_t kQueries = 32, kKeys = 64;
constexpr int64_t kTerms = 8;  // summed before they are added to a longer sum: nearly pairwise

MMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Sizes {
  int64_t num_queries, num_keys, heads, kv_heads, dim, dim_v;
  template <class Args>
  explicit Sizes(const Args& args)
      : num_queries(args.q.size[0]),
        num_keys(args.k.size[0]),
        heads(args.q.size[1]),
        kv_heads(args.k.size[1]),
        dim(args.q.size[2]),
        dim_v(args.v.size[2]) {}
  int64_t group() const { return heads / kv_heads; }
};

// [T, heads, D] with unit stride along D.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  HeadRows(const Tensor& x, int64_t head) : base(x.ptr<const T>() + head * x.stride[1]), stride(x.stride[0]) {}
  const T* row(int64_t t) const { return base + t * stride; }
};

// A mask's vectors, with every interval clamped to the existing keys.
struct Mask {
  const int32_t *lo, *hi, *first_q, *last_q, *span_q, *span_k, *allow_q, *bit_k;
  int64_t num_queries, num_keys;
  Mask(const AdditiveMask& m, const Sizes& n)
      : lo(m.lo.ptr<int32_t>()),
        hi(m.hi.ptr<int32_t>()),
        first_q(m.first_q.ptr<int32_t>()),
        last_q(m.last_q.ptr<int32_t>()),
        span_q(m.span_q.ptr<int32_t>()),
        span_k(m.span_k.ptr<int32_t>()),
        allow_q(m.allow_q.ptr<int32_t>()),
        bit_k(m.bit_k.ptr<int32_t>()),
        num_queries(n.num_queries),
        num_keys(n.num_keys) {}
  int64_t begin(int64_t i) const { return most(lo[i], 0); }
  int64_t end(int64_t i) const { return least(hi[i], num_keys); }
  bool sees(int64_t i, int64_t j) const {
    return span_q == nullptr || span_q[i] == span_k[j] || (allow_q[i] & bit_k[j]) != 0;
  }
};

struct Interval {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The hull of the keys that queries [first, last) see.
inline Interval hull_of_keys(const Mask& mask, int64_t first, int64_t last) {
  Interval all{mask.num_keys, 0};
  for (int64_t i = first; i < last; ++i)
    if (mask.begin(i) < mask.end(i)) all = {least(all.begin, mask.begin(i)), most(all.end, mask.end(i))};
  return all;
}
inline Interval hull_of_queries(const Mask& mask, int64_t first, int64_t last) {
  Interval all{mask.num_queries, 0};
  for (int64_t j = first; j < last; ++j) {
    const int64_t from = most(mask.first_q[j], 0), to = least(mask.last_q[j], mask.num_queries);
    if (from < to) all = {least(all.begin, from), most(all.end, to)};
  }
  return all;
}

// dst[d][j] = row first + j of x, zeros from `count` on: [width, kKeys]. `row` holds one row.
template <class T, class C>
void transpose_tile(HeadRows<T> x, int64_t first, int64_t count, int64_t width, C* row, C* dst) {
  for (int64_t j = 0; j < kKeys; ++j) {
    if (j < count) {
      each_vector<C>(width, [&](int64_t d, int64_t n)
                                __attribute__((always_inline)) { write(row + d, read(x.row(first + j) + d, n), n); });
      for (int64_t d = 0; d < width; ++d) dst[d * kKeys + j] = row[d];
    } else {
      for (int64_t d = 0; d < width; ++d) dst[d * kKeys + j] = 0;
    }
  }
}

// dst[j][d] = x[first + j][d] in the compute type, rows `ld` apart.
template <class T, class C>
void widen_tile(HeadRows<T> x, int64_t first, int64_t count, int64_t width, int64_t ld, C* dst) {
  for (int64_t j = 0; j < count; ++j)
    each_vector<C>(width, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      write(dst + j * ld + d, read(x.row(first + j) + d, n), n);
    });
}

// s[j] = sum_d w[d] tanh(q[d] + k[d][j]) for the whole vectors that cover [from, to); stores the tanh in t, if given.
// NaN is kept only in s: a NaN of an invisible key must not reach a sum through 0 * NaN.
template <class C>
void score(const C* q, const C* w, const C* k, int64_t dim, int64_t from, int64_t to, C* s, C* t) {
  for (int64_t j = from / kLanes<C> * kLanes<C>; j < to; j += kLanes<C>) {
    Vec<C> sum = {};
    for (int64_t first = 0; first < dim; first += kTerms) {
      Vec<C> part = {};
      for (int64_t d = first; d < least(first + kTerms, dim); ++d) {
        const auto x = tanh(load(k + d * kKeys + j) + q[d]);
        if (t != nullptr) store(t + d * kKeys + j, select(x == x, x, Vec<C>{}));
        part += x * w[d];
      }
      sum += part;
    }
    store(s + j, sum);
  }
}

// A query's interval within the key tile that begins at `key`: columns [from, to).
MMK_INLINE Interval columns(const Mask& mask, int64_t i, int64_t key, int64_t keys) {
  return {most(mask.begin(i) - key, 0), least(mask.end(i) - key, keys)};
}

// Sets scores outside [from, to) or the pattern to -inf, including the rest of their vectors.
template <class C>
void blank(const Mask& mask, int64_t i, int64_t key, Interval at, C* s) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t j = at.begin / L * L; j < (at.end + L - 1) / L * L; ++j)
    if (j < at.begin || j >= at.end || !mask.sees(i, key + j)) s[j] = -FloatTraits<C>::infinity;
}

}  // namespace additive
}  // namespace MMK_ISA
}  // namespace mmk
