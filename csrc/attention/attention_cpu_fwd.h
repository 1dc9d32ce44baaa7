// Forward on the CPU.
//
// A task is one head of up to kTilesPerTask query tiles. It loops over their keys in tiles of kKeyTile, packed once for
// all its query tiles. Per pair of tiles: S = Q K^T, online softmax in place, P written directly in the packed layout
// of the left operand, O += P V. S and O are in the compute type; P is rounded to bf16 where the machine multiplies
// bf16. The running maximum is of the unscaled scores, m = max s (min for a negative scale): in exp(scale (s - m)) the
// largest term is exactly 1 and differences of close scores are exact.
#pragma once

#include "attention/attention_cpu_odd_rows.h"
#include "attention/attention_cpu_scores.h"

namespace mmk {
namespace MMK_ISA {

static_assert(kKeyTile <= OddRows<float>::kMost);

template <class T>
struct ForwardScratch {
  using C = ComputeOf<T>;
  using Int = typename IntOf<C>::type;
  static constexpr int64_t ld = kKeyTile + kLanes<C>;  // keeps rows off a power of two

  struct TileState {
    Packed<T>* q;    // A [queries, D]
    C* out;          // [queries, Dv]
    C *shift, *sum;  // running maximum of sign(scale) s, and sum, [queries]
    bool touched;    // false: out is not initialised yet
  };
  TileState tile[kTilesPerTask];
  Packed<T>* k;  // B [D, keys]
  Packed<T>* v;  // B [keys, Dv]
  OddRows<T> odd_v;
  C* s;          // [queries, ld]
  Packed<T>* p;  // A [queries, keys]
  C* rescale;    // [queries]
  // Only with a pattern, a bias or dropout:
  Int *span_k, *bit_k, *class_k;  // [keys], padded to whole registers
  C* bias;
  uint8_t* keep;  // [queries, ld]

  ForwardScratch(Arena& arena, const AttentionShape& n, const AttentionExtras& extras) {
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
    const int64_t pattern = extras.tiles.given() ? ld : 0, biased = extras.pair_bias.given() ? 1 : 0;
    span_k = arena.take<Int>(pattern);
    bit_k = arena.take<Int>(pattern);
    class_k = arena.take<Int>(biased * ld);
    bias = arena.take<C>(biased * BiasTable<C>::kSize);
    keep = arena.take<uint8_t>(extras.seed.given() ? kQueryTile * (kKeyTile + Dropout::kWide) : 0);
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
        extras_(args.extras),
        map_(args.extras.tiles),
        softcap_(args.extras, args.scale),
        distances_(args.extras, head),
        distant_(Distances<C>::given(args.extras)),
        rewrites_(args.extras.tiles.given() || args.extras.pair_bias.given() || softcap_.given() || distant_),
        scale_(static_cast<C>(args.scale)),
        product_scale_(softcap_.given() ? C{1} : scale_),
        score_scale_(distant_ ? C{1} : product_scale_),
        sign_(!rewrites_ && args.scale < 0 ? -1 : 1),
        factor_(rewrites_ ? C{1} : scale_ * sign_),
        dropout_(args.extras, head),
        bias_(args.extras.pair_bias, head, false, scratch.bias),
        q_(head_of<T>(args.q, head)),
        k_(head_of<T>(args.k, head / shape.group())),
        v_(head_of<T>(args.v, head / shape.group())),
        out_(head_of<T>(args.out, head)),
        lse_(args.lse.ptr<C>() + head * shape.num_queries),
        row_max_(args.extras.row_max.given() ? args.extras.row_max.ptr<C>() + head * shape.num_queries : nullptr),
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
        int64_t first = -min64(-key, -tiles[t].key_begin), end = min64(key + keys, tiles[t].key_end);
        if (map_.given()) map_.trim(tiles[t], first, end);
        if (first >= end) continue;
        if (!packed) pack_keys(key, keys);
        packed = true;
        attend(tiles[t], w_.tile[t], key, keys, first - key, end - key);
      }
    }
    for (int64_t t = 0; t < count; ++t) close(tiles[t], w_.tile[t]);
  }

 private:
  using TileState = typename Scratch::TileState;
  using Int = typename Scratch::Int;

  void pack_keys(int64_t key, int64_t keys) {
    pack_columns_b<T>(k_, key, keys, n_.dim, w_.k);
    w_.odd_v.template pack<T>(v_, key, keys, n_.dim_v, w_.v);
    if (map_.given()) {
      copy_padded<Int>(extras_.span_k.ptr<int32_t>() + key, keys, Scratch::ld, 0, w_.span_k);
      copy_padded<Int>(extras_.bit_k.ptr<int32_t>() + key, keys, Scratch::ld, 0, w_.bit_k);
    }
    if (extras_.pair_bias.given()) {
      copy_padded<Int>(extras_.class_k.ptr<int32_t>() + key, keys, Scratch::ld, 0, w_.class_k);
      for (int64_t j = 0; j < keys; ++j) w_.class_k[j] = static_cast<Int>(bias_.column_index(w_.class_k[j]));
    }
  }

  void open(const QueryTile& tile, TileState& state) {
    pack_rows_a<T>(q_, tile.begin, tile.end - tile.begin, n_.dim, state.q);
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      state.shift[i] = -FloatTraits<C>::infinity;
      state.sum[i] = 0;
      if (row_max_ != nullptr) row_max_[tile.begin + i] = -FloatTraits<C>::infinity;
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
    if (row_max_ != nullptr && rewrites_) note_maxima(tile, key, from, width);
    if (softcap_.given()) softcap_.apply(w_.s, nullptr, rows, width, Scratch::ld);
    if (distant_) distances_.apply(w_.s, product_scale_, tile.begin, rows, key + from, width, Scratch::ld);
    if (map_.given() || extras_.pair_bias.given()) write_logits(tile, key, from, width);
    softmax(tile, state, key + from, width);
    if (row_max_ != nullptr && !rewrites_) note_nan(tile, state, key + from, width);
    if (dropout_.given()) drop(tile, key + from, width);
    if (state.touched)
      for (int64_t i = 0; i < rows; ++i)
        if (w_.rescale[i] != 1) scale_row(state.out + i * n_.dim_v, w_.rescale[i]);
    multiply<T>(rows, n_.dim_v, width, w_.p, w_.v, from, keys, state.out, n_.dim_v, state.touched);
    w_.odd_v.template add<T>(rows, width, w_.p, from, state.out, n_.dim_v);
    state.touched = true;
  }

  // Turns scores into logits: scaled (unless they are) and biased, -inf where the pattern hides a key. Column 0 is
  // key + from.
  MMK_NOINLINE void write_logits(const QueryTile& tile, int64_t key, int64_t from, int64_t width) {
    const bool hides = map_.given() && !map_.full(tile, key + from, key + from + width);
    const bool biased = extras_.pair_bias.given();
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      const int64_t query = tile.begin + i;
      C* s = w_.s + i * Scratch::ld;
      const C* bias = biased ? bias_.row(bias_.row_index(extras_.class_q.ptr<int32_t>()[query])) : nullptr;
      const Vec<Int> span = splat(static_cast<Int>(hides ? extras_.span_q.ptr<int32_t>()[query] : 0));
      const Vec<Int> allow = splat(static_cast<Int>(hides ? extras_.allow_q.ptr<int32_t>()[query] : 0));
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        Vec<C> logit = load(s + j) * score_scale_;
        if (biased) logit += look_up(bias, w_.class_k + from + j);
        if (hides) {
          const auto sees = (load_as<Int>(w_.span_k + from + j) == span) |
                            ((load_as<Int>(w_.bit_k + from + j) & allow) != Vec<Int>{});
          logit = select(sees, logit, splat(-FloatTraits<C>::infinity));
        }
        store(s + j, logit);
      }
    }
  }

  // Raises row_max_ to the tile's largest visible scaled product, from scores that are about to be rewritten. As in
  // torch.amax, a NaN among them stays.
  MMK_NOINLINE void note_maxima(const QueryTile& tile, int64_t key, int64_t from, int64_t width) {
    const bool hides = map_.given() && !map_.full(tile, key + from, key + from + width);
    const Vec<C> lowest = splat(-FloatTraits<C>::infinity);
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      const int64_t query = tile.begin + i;
      const Vec<Int> span = splat(static_cast<Int>(hides ? extras_.span_q.ptr<int32_t>()[query] : 0));
      const Vec<Int> allow = splat(static_cast<Int>(hides ? extras_.allow_q.ptr<int32_t>()[query] : 0));
      const Vec<Int> begin = splat(static_cast<Int>(lo_[query] - key)), end = splat(static_cast<Int>(hi_[query] - key));
      Vec<C> best = splat(row_max_[query]);
      auto odd = best != best;
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        const Vec<Int> column = splat(static_cast<Int>(from + j)) + count_lanes<Int>();
        auto sees = (begin <= column) & (column < end) & (column < splat(static_cast<Int>(from + width)));
        if (hides)
          sees &= (load_as<Int>(w_.span_k + from + j) == span) |
                  ((load_as<Int>(w_.bit_k + from + j) & allow) != Vec<Int>{});
        const Vec<C> product = select(sees, load(w_.s + i * Scratch::ld + j) * scale_, lowest);
        odd |= product != product;
        best = max(best, product);
      }
      const bool any_odd = reduce_add(select(odd, splat(C{1}), Vec<C>{})) > 0;
      row_max_[query] = any_odd ? FloatTraits<C>::nan : reduce_max(best);
    }
  }

  // Where scores are not rewritten, row_max_ becomes the softmax's maximum in close(), which drops NaN; so NaN is noted
  // here. It is looked for only in rows whose sum is NaN, from it or from a product of inf. Column 0 is `key`.
  MMK_NOINLINE void note_nan(const QueryTile& tile, const TileState& state, int64_t key, int64_t width) {
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      if (state.sum[i] == state.sum[i]) continue;
      const int64_t query = tile.begin + i;
      for (int64_t j = -min64(0, key - lo_[query]); j < min64(width, hi_[query] - key); ++j) {
        const C product = w_.s[i * Scratch::ld + j] * scale_;
        if (product != product) row_max_[query] = product;
      }
    }
  }

  // Zeros w_.p at dropped pairs; close() applies the factor of the others.
  MMK_NOINLINE void drop(const QueryTile& tile, int64_t key, int64_t width) {
    constexpr int64_t ld = kKeyTile + Dropout::kWide;
    const int64_t rows = tile.end - tile.begin;
    dropout_.for_each(tile.begin, rows, key, width,
                      [&](int64_t i, int64_t j, bool kept) { w_.keep[i * ld + j] = kept; });
    for (int64_t i = 0; i < rows; ++i) {
      const PackedRow<T> p(w_.p, width, i);
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        Packed<T>* lanes = p.at(j);
        for (int64_t l = 0; l < min64(kLanes<C>, width - j); ++l)
          if (!w_.keep[i * ld + j + l]) lanes[l] = Packed<T>{};
      }
    }
  }

  // Turns scores w_.s into probabilities w_.p relative to the running maximum, which it updates; column 0 is `key`.
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
      if (row_max_ != nullptr && !rewrites_ && !empty) {
        C& top = row_max_[tile.begin + i];
        top = top == top ? state.shift[i] * factor_ : top;
      }
      C shift = state.shift[i] * factor_, sum = state.sum[i], factor = static_cast<C>(dropout_.factor());
      if (extras_.sink.given() && !empty) add_sink(shift, sum, factor);
      const C inverse = empty ? 0 : factor / sum;
      T* out = out_.row(tile.begin + i);
      for (int64_t d = 0; d < n_.dim_v; d += L) {
        const int64_t left = min64(L, n_.dim_v - d);
        const Vec<C> x = empty ? Vec<C>{} : load_n(state.out + i * n_.dim_v + d, left) * inverse;
        store_n(out + d, x, left);
      }
      lse_[tile.begin + i] = empty ? -FloatTraits<C>::infinity : shift + log2(splat(sum))[0] * FloatTraits<C>::ln2;
    }
  }

  // Adds the sink's term to a row's sum; `factor` receives the rescaling due to the new maximum.
  MMK_NOINLINE void add_sink(C& shift, C& sum, C& factor) {
    const C sink = extras_.sink.ptr<C>()[head_];
    if (sink <= shift) {
      sum += exp(splat(sink - shift))[0];
      return;
    }
    const C rescale = exp(splat(shift - sink))[0];
    sum = sum * rescale + 1;
    factor *= rescale;
    shift = sink;
  }

  const AttentionShape& n_;
  const QueryTile* tiles_;
  const int64_t head_;
  const int32_t *lo_, *hi_;
  const AttentionExtras& extras_;
  const TileMap map_;
  const SoftCap<C> softcap_;
  const Distances<C> distances_;
  const bool distant_;
  const bool rewrites_;  // whether scores become logits before the softmax
  const C scale_;
  const C product_scale_, score_scale_;  // what is left of the scale after the cap, and after the distances
  const C sign_, factor_;                // sign and magnitude of the scale; 1 and 1 for logits
  const Dropout dropout_;
  const BiasTable<C> bias_;
  const HeadView<T> q_, k_, v_, out_;
  C *lse_, *row_max_;  // row_max_: null if not wanted
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
  const ForwardScratch<T> sizes(measure, shape, args.extras);
  AlignedBuffer<char> memory(measure.used() * usable_threads(tasks, num_threads));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    Arena arena(memory.data() + thread * measure.used());
    const ForwardScratch<T> scratch(arena, shape, args.extras);
    const AttentionTask& part = plan.tasks()[task / shape.heads];
    ForwardTask<T>(args, shape, plan.tiles(), task % shape.heads, scratch).run(part.tile_begin, part.tile_end);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
