// Softmax-weighted negatives and streaming top-k: tile-engine epilogues that keep a few keys per row.
#pragma once

#include "common/simd/math.h"
#include "contrastive/pairs.h"

namespace mmk {
namespace MMK_ISA {

// A 32-bit integer hash in 32- or 64-bit lanes; every output bit depends on every input bit.
template <class V>
MMK_INLINE V mixed(V x) {
  constexpr auto low = static_cast<decltype(x[0] + x[0])>(0xffffffffu);
  x = ((x ^ (x >> 16)) * 0x7feb352du) & low;
  x = ((x ^ (x >> 15)) * 0x846ca68bu) & low;
  return x ^ (x >> 16);
}

// Draws one key per row with its softmax probability among the negatives: the largest scale a - log E, with exponential
// variates E that depend only on seed, row and column.
template <class Tile>
class SampleForward {
  using C = typename Tile::Number;
  using Bits = typename IntOf<C>::bits;
  static constexpr int L = kLanes<C>;

 public:
  SampleForward(int64_t n, C scale, const int64_t* seed, const Pairs<C>& pairs, int64_t* index)
      : scale_(scale),
        seed_row_(static_cast<Bits>(seed[0])),
        seed_column_(static_cast<Bits>(seed[1])),
        pairs_(pairs),
        best_(n),
        index_(index) {
    for (int64_t i = 0; i < n; ++i) best_.data()[i] = -FloatTraits<C>::infinity, index[i] = -1;
  }

  void tile(int64_t, const Tile& tile, const C*) const {
    const auto lane = lane_numbers<C>();
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.i0 + r;
      const auto row = pairs_.row(tile, r);
      const Bits of_row = mixed(splat_bits(static_cast<Bits>(i)) ^ seed_row_)[0];
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const auto column = bit_cast<Vec<Bits>>(lane) + static_cast<Bits>(tile.j0 + v);
        const auto bits = mixed(mixed(column ^ of_row) ^ seed_column_);
        const Vec<C> a = load(tile.row(r) + v), noise = log2(exponential(bits)) * FloatTraits<C>::ln2;
        Vec<C> score = keep(in, a * scale_ - noise, splat(-FloatTraits<C>::infinity));
        score = pairs_.positive(row, v) | pairs_.unseen(row, v) ? splat(-FloatTraits<C>::infinity) : score;
        if (!(reduce_max(score) > best_.data()[i])) return;
        for (int k = 0; k < L; ++k)
          if (score[k] > best_.data()[i]) best_.data()[i] = score[k], index_[i] = tile.j0 + v + k;
      });
    }
  }
  void finish_columns(int64_t, int64_t) const {}

 private:
  static Vec<Bits> splat_bits(Bits x) { return Vec<Bits>{} + x; }

  // -log(1 - u) for u = (bits + 1/2) / 2^32, accurate for small u too, which win.
  static MMK_INLINE Vec<C> exponential(Vec<Bits> bits) {
    const Vec<C> u = (__builtin_convertvector(bits, Vec<C>) + C(0.5)) * C(0x1p-32);
    const Vec<C> high = min(splat(C(1) - C(0x1p-24)), u);
    return -FloatTraits<C>::ln2 * (u < C(0.25) ? log2_sum<C>(Vec<C>{}, -u) : log2(C(1) - high));
  }

  const C scale_;
  const Bits seed_row_, seed_column_;
  const Pairs<C>& pairs_;
  AlignedBuffer<C> best_;
  int64_t* const index_;
};

// The k most similar keys of each row in order, ties by lower index. NaN counts as -inf.
template <class Tile>
class TopKForward {
  using C = typename Tile::Number;
  static constexpr int L = kLanes<C>;

 public:
  TopKForward(int64_t k, C* values, int64_t* indices) : k_(k), values_(values), indices_(indices) {}

  void tile(int64_t, const Tile& tile, const C*) const {
    const Vec<C> lowest = splat(-FloatTraits<C>::infinity);
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* values = values_ + (tile.i0 + r) * k_;
      int64_t* indices = indices_ + (tile.i0 + r) * k_;
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        Vec<C> a = keep(in, load(tile.row(r) + v), lowest);
        a = a == a ? a : lowest;
        const int64_t before = tile.j0 + v;
        if (before >= k_ && !(reduce_max(a) > values[k_ - 1])) return;
        const int64_t there = min64(tile.cols - v, L);
        for (int64_t c = 0; c < there; ++c) insert(a[c], before + c, values, indices);
      });
    }
  }
  void finish_columns(int64_t, int64_t) const {}

 private:
  // Inserts column j into the min(j, k) best of the previous columns.
  void insert(C a, int64_t j, C* values, int64_t* indices) const {
    int64_t at = min64(j, k_);
    if (at == k_ && !(a > values[k_ - 1])) return;
    if (at == k_) --at;
    for (; at > 0 && a > values[at - 1]; --at) values[at] = values[at - 1], indices[at] = indices[at - 1];
    values[at] = a;
    indices[at] = j;
  }

  const int64_t k_;
  C* const values_;
  int64_t* const indices_;
};

}  // namespace MMK_ISA
}  // namespace mmk
