// Which pairs of a tile are positive or not seen, and the epilogues' loops over a tile's vectors.
#pragma once

#include "contrastive/tiles.h"

namespace mmk {
namespace MMK_ISA {

// 0, 1, 2, ... in the integer lanes matching C.
template <class C>
MMK_INLINE Vec<typename IntOf<C>::type> lane_numbers() {
  Vec<typename IntOf<C>::type> lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = i;
  return lane;
}

// The mask of a vector whose lanes are all in bounds.
struct AllLanes {};
template <class V>
MMK_INLINE V keep(AllLanes, V value) {
  return value;
}
template <class M, class V>
MMK_INLINE V keep(M mask, V value) {
  return mask ? value : V{};
}
template <class V>
MMK_INLINE V keep(AllLanes, V value, V) {
  return value;
}
template <class M, class V>
MMK_INLINE V keep(M mask, V value, V otherwise) {
  return mask ? value : otherwise;
}

// Calls body(offset, in) for each vector of a row of `count` elements; the mask `in` marks the lanes in bounds.
template <class C, class Body>
MMK_INLINE void for_each_vector(int64_t count, Body body) {
  using Int = typename IntOf<C>::type;
  int64_t v = 0;
  for (; v + kLanes<C> <= count; v += kLanes<C>) body(v, AllLanes{});
  if (v < count) body(v, lane_numbers<C>() < static_cast<Int>(count - v));
}

// targets [N]: the one positive of each row, or -1; ids: int32 codes of rows [N] and columns [M]. With ids and without
// `ignore`, pairs with equal ids are positive; with `ignore` they are not seen, except the target. thresholds [N]: nor
// are keys that the guide finds more similar than that, except the target.
struct PairRule {
  const int64_t* targets = nullptr;
  const int32_t *row_ids = nullptr, *column_ids = nullptr;
  bool ignore = false;
  const double* thresholds = nullptr;

  bool by_id() const { return row_ids && !ignore; }
  bool ignores() const { return row_ids && ignore; }
  bool hides() const { return ignores() || thresholds; }
  int64_t target(int64_t i) const { return targets && !by_id() ? targets[i] : -1; }
};

template <class C>
class Pairs {
  using Int = typename IntOf<C>::type;
  using Mask = decltype(Vec<Int>{} == Vec<Int>{});

 public:
  Pairs(const PairRule& rule, int64_t columns) : rule_(rule), ids_(rule.row_ids ? columns + kLanes<C> : 0) {
    if (rule.row_ids)
      for (int64_t j = 0; j < columns + kLanes<C>; ++j) ids_.data()[j] = j < columns ? rule.column_ids[j] : -1;
  }

  const PairRule& rule() const { return rule_; }

  // Whether a tile contains any row's target.
  template <class Tile>
  bool meet(const Tile& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r)
      if (in(tile, r) >= 0) return true;
    return false;
  }
  // The column within the tile of row r's target; -1 if it is elsewhere.
  template <class Tile>
  int64_t in(const Tile& tile, int64_t r) const {
    const int64_t column = rule_.target(tile.i0 + r) - tile.j0;
    return column >= 0 && column < tile.cols ? column : -1;
  }

  // The masks of one row of a tile.
  struct Row {
    Int target, id;
    const Int* ids;
    const C* guide;
    C threshold;

    MMK_INLINE Mask is_target(int64_t v) const {
      return lane_numbers<C>() == (target >= v ? static_cast<Int>(target - v) : Int{-1});
    }
    MMK_INLINE Mask same_id(int64_t v) const { return load_as<Int>(ids + v) == id; }
    MMK_INLINE Mask above(int64_t v) const { return Mask(load(guide + v) > threshold); }
  };
  template <class Tile>
  Row row(const Tile& tile, int64_t r) const {
    return {static_cast<Int>(in(tile, r)), rule_.row_ids ? static_cast<Int>(rule_.row_ids[tile.i0 + r]) : Int{0},
            ids_.data() + (rule_.row_ids ? tile.j0 : 0), tile.guide ? tile.guide + r * Tile::kCols : nullptr,
            rule_.thresholds ? static_cast<C>(rule_.thresholds[tile.i0 + r]) : C{0}};
  }
  MMK_INLINE Mask positive(const Row& row, int64_t v) const {
    return rule_.by_id() ? row.same_id(v) : row.is_target(v);
  }
  MMK_INLINE Mask unseen(const Row& row, int64_t v) const {
    if (!rule_.thresholds) return rule_.ignores() ? Mask(row.same_id(v) & ~row.is_target(v)) : Mask{};
    const Mask above = row.above(v);
    return (rule_.ignores() ? Mask(above | row.same_id(v)) : above) & ~row.is_target(v);
  }

 private:
  const PairRule rule_;
  AlignedBuffer<Int> ids_;  // [M], readable for one vector past the end
};

}  // namespace MMK_ISA
}  // namespace mmk
