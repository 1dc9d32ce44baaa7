// Forward on the CPU.
//
// A task is one head of up to kTilesPerTask query tiles. It walks their keys in tiles of kKeyTile, which it packs once
// for all its query tiles. Per pair of tiles: S = Q K^T, the online softmax in place, P written straight into the
// packed layout of the left operand, O += P V. S and O are in the compute type; P is rounded to bf16 where the machine
// multiplies bf16. The running maximum is of the scores before scaling, m = max s (min for a negative scale): in
// exp(scale (s - m)) the largest term is exactly 1 and the difference of near scores is exact.
#pragma once

#include "attention/attention_cpu_tiles.h"

namespace mmk {
namespace MMK_ISA {

template <class T>
struct ForwardScratch {
  using C = ComputeOf<T>;
  static constexpr int64_t ld = kKeyTile + kLanes<C>;  // keeps rows off a power of two

  struct TileState {
    Packed<T>* q;    // A [queries, D]
    C* out;          // [queries, Dv]
    C *shift, *sum;  // running maximum of sign(scale) s, and sum, [queries]
    bool touched;    // false: out holds nothing yet
  };
  TileState tile[kTilesPerTask];
  Packed<T>* k;  // B [D, keys]
  Packed<T>* v;  // B [keys, Dv]
  C* s;          // [queries, ld]
  Packed<T>* p;  // A [queries, keys]
  C* rescale;    // [queries]

  ForwardScratch(Arena& arena, const AttentionShape& n) {
    for (TileState& t : tile) {
      t.q = arena.take<Packed<T>>(packed_size_a<T>(kQueryTile, n.dim));
      t.out = arena.take<C>(kQueryTile * n.dim_v);
      t.shift = arena.take<C>(kQueryTile);
      t.sum = arena.take<C>(kQueryTile);
    }
    k = arena.take<Packed<T>>(packed_size_b<T>(kKeyTile, n.dim));
    v = arena.take<Packed<T>>(packed_size_b<T>(n.dim_v, kKeyTile));
    s = arena.take<C>(kQueryTile * ld);
    p = arena.take<Packed<T>>(packed_size_a<T>(kQueryTile, kKeyTile));
    rescale = arena.take<C>(kQueryTile);
  }
};

// Largest of sign * s[j] over the columns [from, to); -inf if there is none.
template <class C>
MMK_INLINE C row_maximum(const C* s, int64_t from, int64_t to, C sign) {
  constexpr int L = kLanes<C>;
  const C lowest = -FloatTraits<C>::infinity;
  Vec<C> best = splat(lowest);
  int64_t j = from;
  for (; j + L <= to; j += L) best = max(best, load(s + j) * sign);
  if (j < to) {
    using Int = typename IntOf<C>::type;
    const auto inside = count_lanes<Int>() < static_cast<Int>(to - j);
    best = max(best, select(inside, load_n(s + j, to - j) * sign, splat(lowest)));
  }
  return reduce_max(best);
}

// p[j] = exp(factor (sign s[j] - shift)) for j in [from, to), 0 in the rest of [0, width); returns the sum. Whole
// vectors of s are read.
template <class T, class C = ComputeOf<T>>
MMK_INLINE C row_exponentials(const C* s, int64_t from, int64_t to, int64_t width, C sign, C shift, C factor,
                              PackedRow<T> p) {
  using Int = typename IntOf<C>::type;
  constexpr int L = kLanes<C>;
  Vec<C> sum = {};
  for (int64_t j = 0; j < width; j += L) {
    if (j >= to || j + L <= from) {
      store_packed(p.at(j), Vec<C>{});
      continue;
    }
    Vec<C> x = exp((load(s + j) * sign - shift) * factor);
    if (j < from || j + L > to) {
      const auto lane = count_lanes<Int>();
      x = select((lane >= static_cast<Int>(from - j)) & (lane < static_cast<Int>(to - j)), x, Vec<C>{});
    }
    sum += x;
    store_packed(p.at(j), x);
  }
  return reduce_add(sum);
}

template <class T>
class ForwardTask {
  using C = ComputeOf<T>;
  using Scratch = ForwardScratch<T>;

 public:
  ForwardTask(const AttentionFwdArgs& args, const AttentionShape& shape, const QueryTile* tiles, int64_t head,
              const Scratch& scratch)
      : n_(shape),
        tiles_(tiles),
        head_(head),
        lo_(args.mask.lo.ptr<int32_t>()),
        hi_(args.mask.hi.ptr<int32_t>()),
        sign_(args.scale < 0 ? -1 : 1),
        factor_(static_cast<C>(args.scale) * sign_),
        q_(head_of<T>(args.q, head)),
        k_(head_of<T>(args.k, head / shape.group())),
        v_(head_of<T>(args.v, head / shape.group())),
        out_(head_of<T>(args.out, head)),
        lse_(args.lse.ptr<C>() + head * shape.num_queries),
        w_(scratch) {}

  void run(int64_t tile_begin, int64_t tile_end) {
    const int64_t count = tile_end - tile_begin;
    const QueryTile* tiles = tiles_ + tile_begin;
    int64_t key_begin = n_.num_keys, key_end = 0;
    for (int64_t t = 0; t < count; ++t) {
      open(tiles[t], w_.tile[t]);
      if (tiles[t].key_begin == tiles[t].key_end) continue;
      key_begin = min64(key_begin, tiles[t].key_begin);
      key_end = -min64(-key_end, -tiles[t].key_end);
    }
    for (int64_t key = key_begin; key < key_end; key += kKeyTile) {
      const int64_t keys = min64(kKeyTile, key_end - key);
      bool packed = false;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t from = -min64(0, key - tiles[t].key_begin), to = min64(keys, tiles[t].key_end - key);
        if (from >= to) continue;
        if (!packed) {
          pack_columns_b<T>(k_, key, keys, n_.dim, w_.k);
          pack_rows_b<T>(v_, key, keys, n_.dim_v, w_.v);
          packed = true;
        }
        attend(tiles[t], w_.tile[t], key, keys, from, to);
      }
    }
    for (int64_t t = 0; t < count; ++t) close(tiles[t], w_.tile[t]);
  }

 private:
  using TileState = typename Scratch::TileState;

  void open(const QueryTile& tile, TileState& state) {
    pack_rows_a<T>(q_, tile.begin, tile.end - tile.begin, n_.dim, state.q);
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      state.shift[i] = -FloatTraits<C>::infinity;
      state.sum[i] = 0;
    }
    state.touched = false;
  }

  // The tile's queries against columns [from, to) of the packed key tile, which begins at `key`.
  void attend(const QueryTile& tile, TileState& state, int64_t key, int64_t keys, int64_t from, int64_t to) {
    const int64_t rows = tile.end - tile.begin;
    from -= from % kColTile<T>;
    const int64_t width = to - from;
    multiply<T>(rows, width, n_.dim, state.q, w_.k + from / kColTile<T> * panel_size_b<T>(n_.dim), 0, n_.dim, w_.s,
                Scratch::ld, false);
    softmax(tile, state, key + from, width);
    if (state.touched)
      for (int64_t i = 0; i < rows; ++i)
        if (w_.rescale[i] != 1) scale_row(state.out + i * n_.dim_v, w_.rescale[i]);
    multiply<T>(rows, n_.dim_v, width, w_.p, w_.v, from, keys, state.out, n_.dim_v, state.touched);
    state.touched = true;
  }

  // Turns scores w_.s into probabilities w_.p relative to the running maximum, which it moves; column 0 is `key`.
  void softmax(const QueryTile& tile, TileState& state, int64_t key, int64_t width) {
    const int64_t rows = tile.end - tile.begin;
    for (int64_t i = 0; i < rows; ++i) {
      const C* s = w_.s + i * Scratch::ld;
      const int64_t from = -min64(0, key - lo_[tile.begin + i]), to = min64(width, hi_[tile.begin + i] - key);
      const PackedRow<T> p(w_.p, width, i);
      if (from >= to) {
        for (int64_t j = 0; j < width; j += kLanes<C>) store_packed(p.at(j), Vec<C>{});
        w_.rescale[i] = 1;
        continue;
      }
      const C before = state.shift[i], now = row_maximum(s, from, to, sign_);
      const C shift = now > before ? now : before;
      // All logits -inf so far: subtracting 0 leaves their exponentials at 0.
      const C finite = shift == -FloatTraits<C>::infinity ? 0 : shift;
      const C rescale = before == shift                       ? 1
                        : before == -FloatTraits<C>::infinity ? 0
                                                              : exp(splat((before - finite) * factor_))[0];
      state.sum[i] = state.sum[i] * rescale + row_exponentials<T>(s, from, to, width, sign_, finite, factor_, p);
      state.shift[i] = shift;
      w_.rescale[i] = rescale;
    }
  }

  void scale_row(C* row, C factor) {
    int64_t d = 0;
    for (; d + kLanes<C> <= n_.dim_v; d += kLanes<C>) store(row + d, load(row + d) * factor);
    for (; d < n_.dim_v; ++d) row[d] *= factor;
  }

  void close(const QueryTile& tile, const TileState& state) {
    constexpr int L = kLanes<C>;
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      const bool empty = state.sum[i] == 0;
      const C inverse = empty ? 0 : 1 / state.sum[i];
      T* out = out_.row(tile.begin + i);
      for (int64_t d = 0; d < n_.dim_v; d += L) {
        const int64_t left = min64(L, n_.dim_v - d);
        const Vec<C> x = empty ? Vec<C>{} : load_n(state.out + i * n_.dim_v + d, left) * inverse;
        store_n(out + d, x, left);
      }
      lse_[tile.begin + i] = empty ? -FloatTraits<C>::infinity
                                   : state.shift[i] * factor_ + log2(splat(state.sum[i]))[0] * FloatTraits<C>::ln2;
    }
  }

  const AttentionShape& n_;
  const QueryTile* tiles_;
  const int64_t head_;
  const int32_t *lo_, *hi_;
  const C sign_, factor_;  // of the scale
  const HeadView<T> q_, k_, v_, out_;
  C* lse_;
  Scratch w_;
};

template <class T>
void forward(const AttentionFwdArgs& args, int num_threads) {
  const AttentionShape shape(args);
  if (shape.num_queries == 0) return;
  AttentionPlan plan(args.mask.lo.ptr<int32_t>(), args.mask.hi.ptr<int32_t>(), shape.num_queries, shape.num_keys);
  plan.cut_queries(tiles_per_task(plan.num_tiles(), shape.heads, num_threads));
  const int64_t tasks = plan.num_tasks() * shape.heads;

  Arena measure(nullptr);
  const ForwardScratch<T> sizes(measure, shape);
  AlignedBuffer<char> memory(measure.used() * usable_threads(tasks, num_threads));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    Arena arena(memory.data() + thread * measure.used());
    const ForwardScratch<T> scratch(arena, shape);
    const AttentionTask& part = plan.tasks()[task / shape.heads];
    ForwardTask<T>(args, shape, plan.tiles(), task % shape.heads, scratch).run(part.tile_begin, part.tile_end);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
