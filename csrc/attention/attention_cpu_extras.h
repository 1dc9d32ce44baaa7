// Mask patterns, pair bias, sink and dropout in the CPU kernels.
//
// Pattern and bias are applied to a tile of scores before the softmax, which replaces them by scaled logits, -inf for
// invisible pairs. From there on the tile needs no mask and has scale 1. The tile map tells which part of a tile to
// skip and where every pair is visible. Dropout is a factor z per pair: 0, or 1 / (1 - p).
#pragma once

#include "attention/attention.h"
#include "attention/attention_cpu_tiles.h"

namespace mmk {
namespace MMK_ISA {

// Two bits per 128 queries x 64 keys (mmkernels/ops/attention/tiles.py).
class TileMap {
 public:
  explicit TileMap(const Tensor& tiles) : words_(tiles.ptr<int32_t>()), stride_(tiles.size[1]) {}
  bool given() const { return words_ != nullptr; }

  // Trims keys that no query of the tile sees from both ends of [begin, end).
  void trim(const QueryTile& tile, int64_t& begin, int64_t& end) const {
    while (begin < end && all(tile, begin / kKeys, kSkip)) begin = min64(end, (begin / kKeys + 1) * kKeys);
    while (begin < end && all(tile, (end - 1) / kKeys, kSkip)) end = -min64(-begin, -((end - 1) / kKeys * kKeys));
  }
  // Whether every query of the tile sees all keys of [begin, end).
  bool full(const QueryTile& tile, int64_t begin, int64_t end) const {
    for (int64_t k = begin / kKeys; k * kKeys < end; ++k)
      if (!all(tile, k, kFull)) return false;
    return true;
  }

 private:
  static constexpr int64_t kQueries = 128, kKeys = 64, kPerWord = 16;
  static constexpr int kSkip = 0, kFull = 2;

  bool all(const QueryTile& tile, int64_t k, int state) const {
    for (int64_t q = tile.begin / kQueries; q * kQueries < tile.end; ++q)
      if ((words_[q * stride_ + k / kPerWord] >> 2 * (k % kPerWord) & 3) != state) return false;
    return true;
  }

  const int32_t* words_;
  int64_t stride_;
};

// The bias of one head with a border of NaN: a class out of range gives NaN and reads no foreign memory.
template <class C>
class BiasTable {
 public:
  static constexpr int64_t kSize = 33 * 33;  // 32 classes at most

  // Rows are query classes, or key classes if transposed.
  BiasTable(const Tensor& bias, int64_t head, bool transposed, C* memory) : data_(memory) {
    if (!bias.given()) return;
    const int64_t classes_q = bias.size[1], classes_k = bias.size[2];
    rows_ = transposed ? classes_k : classes_q;
    columns_ = transposed ? classes_q : classes_k;
    const C* from = bias.ptr<C>() + head * classes_q * classes_k;
    for (int64_t i = 0; i <= rows_; ++i)
      for (int64_t j = 0; j <= columns_; ++j)
        data_[i * (columns_ + 1) + j] = i == rows_ || j == columns_ ? FloatTraits<C>::nan
                                        : transposed                ? from[j * classes_k + i]
                                                                    : from[i * classes_k + j];
  }
  int64_t row_index(int64_t c) const { return c >= 0 && c < rows_ ? c : rows_; }
  int64_t column_index(int64_t c) const { return c >= 0 && c < columns_ ? c : columns_; }
  const C* row(int64_t index) const { return data_ + index * (columns_ + 1); }

 private:
  C* data_;
  int64_t rows_ = 0, columns_ = 0;
};

// row[index[l]] for each lane.
template <class C, class Int>
MMK_INLINE Vec<C> look_up(const C* row, const Int* index) {
  C lanes[kLanes<C>];
  for (int l = 0; l < kLanes<C>; ++l) lanes[l] = row[index[l]];
  return load_as<C>(lanes);
}

// n numbers as Int, padded with `fill` to `padded`.
template <class Int>
void copy_padded(const int32_t* from, int64_t n, int64_t padded, Int fill, Int* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  for (int64_t i = n; i < padded; ++i) to[i] = fill;
}

// Philox 4x32-10 (Salmon et al. 2011): which pairs of a head are kept. Query i and key j use word i % 4 at the counter
// (j, i / 4, head, 0).
class Dropout {
 public:
  Dropout(const AttentionExtras& extras, int64_t head)
      : given_(extras.seed.given()),
        head_(static_cast<uint32_t>(head)),
        seed_(given_ ? static_cast<uint64_t>(*extras.seed.ptr<int64_t>()) : 0),
        // round as Python does, ties to even
        below_(static_cast<uint32_t>(__builtin_nearbyint((1.0 - extras.dropout_p) * 2147483648.0))),
        factor_(1.0 / (1.0 - extras.dropout_p)) {}
  bool given() const { return given_; }
  double factor() const { return factor_; }

  // put(i, j, kept) for every pair of queries [query, query + rows) and keys [key, key + width), rounded up to 16 keys.
  template <class Put>
  void for_each(int64_t query, int64_t rows, int64_t key, int64_t width, const Put& put) const {
    for (int64_t group = query / 4; 4 * group < query + rows; ++group)
      for (int64_t j = 0; j < width; j += kWide) {
        uint32_t word[4][kWide];
        words(static_cast<uint32_t>(key + j), static_cast<uint32_t>(group), word);
        for (int64_t w = 0; w < 4; ++w) {
          const int64_t i = 4 * group + w - query;
          if (i < 0 || i >= rows) continue;
          for (int l = 0; l < kWide; ++l) put(i, j + l, (word[w][l] >> 1) < below_);
        }
      }
  }

  static constexpr int64_t kWide = 16;

 private:
  void words(uint32_t key, uint32_t group, uint32_t (&w)[4][kWide]) const {
    for (int l = 0; l < kWide; ++l) {
      w[0][l] = key + static_cast<uint32_t>(l);
      w[1][l] = group;
      w[2][l] = head_;
      w[3][l] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int l = 0; l < kWide; ++l) {
        const uint64_t a = uint64_t{0xD2511F53u} * w[0][l], b = uint64_t{0xCD9E8D57u} * w[2][l];
        w[0][l] = static_cast<uint32_t>(b >> 32) ^ w[1][l] ^ k0;
        w[2][l] = static_cast<uint32_t>(a >> 32) ^ w[3][l] ^ k1;
        w[1][l] = static_cast<uint32_t>(b);
        w[3][l] = static_cast<uint32_t>(a);
      }
  }

  const bool given_;
  const uint32_t head_;
  const uint64_t seed_;
  const uint32_t below_;
  const double factor_;
};

}  // namespace MMK_ISA
}  // namespace mmk
