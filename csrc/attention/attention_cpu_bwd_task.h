// One task of the CPU backward; see attention_cpu_bwd.h.
#pragma once

#include "attention/attention_cpu_mean_keys.h"

namespace mmk {
namespace MMK_ISA {

static_assert(kGradientKeyTile <= OddRows<float>::kMost && kQueryTile <= OddRows<float>::kMost);

// One task: want_dq and want_dkv say which gradients it owns.
template <class T, class S, bool want_dq, bool want_dkv>
class BackwardTask {
  using C = ComputeOf<T>;
  using Scratch = BackwardScratch<T, S>;
  using TileState = typename Scratch::TileState;
  using Int = typename Scratch::Int;

 public:
  BackwardTask(const AttentionBwdArgs& args, const AttentionShape& shape, const QueryTile* tiles,
               const AttentionTask& part, const Scratch& scratch)
      : args_(args),
        n_(shape),
        tiles_(tiles),
        part_(part),
        map_(args.extras.tiles),
        softcap_(args.extras, args.scale),
        distant_(Distances<C>::given(args.extras)),
        rewrites_(args.extras.tiles.given() || args.extras.pair_bias.given() || softcap_.given() || distant_ ||
                  (args.extras.sink.given() && args.scale > -1e-6 && args.scale < 1e-6)),
        scale_(static_cast<C>(args.scale)),
        product_scale_(softcap_.given() ? C{1} : scale_),
        score_scale_(distant_ ? C{1} : product_scale_),
        logit_scale_(rewrites_ ? C{1} : scale_),
        w_(scratch),
        mean_keys_(args, shape, w_) {}

  // The query heads [head_begin, head_end), which share one key/value head.
  void run(int64_t head_begin, int64_t head_end) {
    const int64_t kv_head = head_begin / n_.group(), keys = part_.key_end - part_.key_begin;
    if (want_dkv) {
      clear(w_.dk, keys * n_.dim);
      clear(w_.dv, keys * n_.dim_v);
    }
    for (int64_t head = head_begin; head < head_end; ++head)
      for (int64_t t = part_.tile_begin; t < part_.tile_end; t += kTilesPerTask)
        run_tiles(head, kv_head, t, min64(t + kTilesPerTask, part_.tile_end));
    if (want_dkv) {
      write_rows<T>(w_.dk, keys, n_.dim, scale_, head_of<T>(args_.dk, kv_head), part_.key_begin);
      write_rows<T>(w_.dv, keys, n_.dim_v, C{1}, head_of<T>(args_.dv, kv_head), part_.key_begin);
    }
  }

 private:
  void run_tiles(int64_t head, int64_t kv_head, int64_t tile_begin, int64_t tile_end) {
    const QueryTile* tiles = tiles_ + tile_begin;
    const int64_t count = tile_end - tile_begin;
    const Dropout dropout(args_.extras, head);
    const BiasTable<C> bias(args_.extras.pair_bias, head, true, w_.bias);
    const Distances<C> distances(args_.extras, head);
    int64_t key_begin = part_.key_end, key_end = part_.key_begin;
    for (int64_t t = 0; t < count; ++t) {
      if (tiles[t].key_begin == tiles[t].key_end) continue;
      key_begin = min64(key_begin, tiles[t].key_begin);
      key_end = -min64(-key_end, -tiles[t].key_end);
    }
    key_begin = -min64(-key_begin, -part_.key_begin);
    key_end = min64(key_end, part_.key_end);
    if (key_begin < key_end || want_dq)
      for (int64_t t = 0; t < count; ++t) open(head, tiles[t], w_.tile[t], bias);
    const HeadView<T> k = head_of<T>(args_.k, kv_head), v = head_of<T>(args_.v, kv_head);
    for (int64_t key = key_begin; key < key_end; key += kGradientKeyTile) {
      const int64_t keys = min64(kGradientKeyTile, key_end - key);
      pack_rows_a<T>(k, key, keys, n_.dim, w_.k);
      pack_rows_a<T>(v, key, keys, n_.dim_v, w_.v);
      if (want_dq) w_.odd_k.template pack<S>(k, key, keys, n_.dim, w_.k_rows);
      if (want_dq && key_end - key_begin > kGradientKeyTile) mean_keys_.pack(k, key, keys);
      for (int64_t t = 0; t < count; ++t) {
        int64_t first = -min64(-key, -tiles[t].key_begin), end = min64(key + keys, tiles[t].key_end);
        if (map_.given()) map_.trim(tiles[t], first, end);
        if (first < end)
          differentiate(tiles[t], w_.tile[t], bias, distances, dropout, key, keys, first - key, end - key);
      }
    }
    if (!want_dq) return;
    for (int64_t t = 0; t < count; ++t) {
      if (w_.tile[t].in_parts) mean_keys_.settle(w_.tile[t], tiles[t].end - tiles[t].begin, k);
      write_rows<T>(w_.tile[t].dq, tiles[t].end - tiles[t].begin, n_.dim, scale_, head_of<T>(args_.dq, head),
                    tiles[t].begin);
      C* delta = args_.delta.ptr<C>() + head * n_.num_queries;
      for (int64_t i = tiles[t].begin; i < tiles[t].end; ++i)
        delta[i] = w_.tile[t].dot[i - tiles[t].begin] - w_.tile[t].dlse[i - tiles[t].begin];
      if (args_.extras.pair_bias.given()) write_row_sums(head, tiles[t], w_.tile[t]);
      if (distant_) {
        C* sums = args_.extras.distance_sums.ptr<C>() + head * n_.num_queries + tiles[t].begin;
        for (int64_t i = 0; i < tiles[t].end - tiles[t].begin; ++i) sums[i] = w_.tile[t].distance_sum[i];
      }
    }
  }

  void write_row_sums(int64_t head, const QueryTile& tile, const TileState& state) {
    const int64_t classes = args_.extras.pair_bias.size[2];
    for (int64_t c = 0; c < classes; ++c) {
      C* sums = args_.extras.row_sums.ptr<C>() + (head * classes + c) * n_.num_queries;
      for (int64_t i = 0; i < tile.end - tile.begin; ++i) sums[tile.begin + i] = state.row_sums[c * kQueryTile + i];
    }
  }

  void open(int64_t head, const QueryTile& tile, TileState& state, const BiasTable<C>& bias) {
    const int64_t rows = tile.end - tile.begin;
    const HeadView<T> q = head_of<T>(args_.q, head), grad_out = head_of<T>(args_.grad_out, head);
    pack_columns_b<T>(q, tile.begin, rows, n_.dim, state.q_columns);
    pack_columns_b<T>(grad_out, tile.begin, rows, n_.dim_v, state.do_columns);
    if (want_dq) {
      pack_columns_b<T>(head_of<T>(args_.out, head), tile.begin, rows, n_.dim_v, w_.out_columns);
      multiply_columns<T>(rows, n_.dim_v, state.do_columns, w_.out_columns, state.dot);
    }
    if (want_dkv) {
      state.odd_q.template pack<S>(q, tile.begin, rows, n_.dim, state.q_rows);
      state.odd_do.template pack<S>(grad_out, tile.begin, rows, n_.dim_v, state.do_rows);
    }
    if (want_dq) {
      clear(state.dq, rows * n_.dim);
      clear(state.ds_sum, kQueryTile);
      clear(state.weight, kQueryTile);
      clear(state.weight_square, kQueryTile);
      clear(state.square_sum, kQueryTile);
      state.sampled = state.in_parts = false;
    }
    const C* lse = args_.lse.ptr<C>() + head * n_.num_queries + tile.begin;
    const C* dlse = args_.grad_lse.given() ? args_.grad_lse.ptr<C>() + head * n_.num_queries + tile.begin : nullptr;
    const C* delta = args_.delta.ptr<C>() + head * n_.num_queries + tile.begin;
    const int32_t *lo = args_.mask.lo.ptr<int32_t>() + tile.begin, *hi = args_.mask.hi.ptr<int32_t>() + tile.begin;
    for (int64_t i = 0; i < kQueryTile; ++i) {  // columns beyond the tile see nothing
      // A query that sees nothing has lse -inf; against 0 its logits, all -inf, give 0.
      state.lse[i] = i < rows && lse[i] != -FloatTraits<C>::infinity ? lse[i] : 0;
      state.dlse[i] = i < rows && dlse != nullptr ? dlse[i] : 0;
      if (!want_dq) state.dot[i] = i < rows ? delta[i] + state.dlse[i] : 0;
      state.lo[i] = i < rows ? lo[i] : 0;
      state.hi[i] = i < rows ? hi[i] : 0;
    }
    const AttentionExtras& extras = args_.extras;
    state.sink = extras.sink.given() ? extras.sink.ptr<C>()[head] : -FloatTraits<C>::infinity;
    if (map_.given()) {
      copy_padded<Int>(extras.span_q.ptr<int32_t>() + tile.begin, rows, kQueryTile, 0, state.span);
      copy_padded<Int>(extras.allow_q.ptr<int32_t>() + tile.begin, rows, kQueryTile, 0, state.allow);
    }
    if (distant_) {
      copy_padded<Int>(extras.at_q.ptr<int32_t>() + tile.begin, rows, kQueryTile, 0, state.at);
      clear(state.distance_sum, kQueryTile);
      clear(state.distance_weight, kQueryTile);
    }
    if (extras.pair_bias.given()) {
      copy_padded<Int>(extras.class_q.ptr<int32_t>() + tile.begin, rows, kQueryTile, 0, state.class_q);
      for (int64_t i = 0; i < rows; ++i) state.class_q[i] = static_cast<Int>(bias.column_index(state.class_q[i]));
      if (want_dq) clear(state.row_sums, kQueryTile * (extras.pair_bias.size[2] + 1));
    }
  }

  // The tile's queries against rows [from, to) of the packed key tile, which begins at `key`.
  void differentiate(const QueryTile& tile, TileState& state, const BiasTable<C>& bias, const Distances<C>& distances,
                     const Dropout& dropout, int64_t key, int64_t keys, int64_t from, int64_t to) {
    const int64_t rows = tile.end - tile.begin;
    // k_begin of the product for dQ must not split a word.
    constexpr int64_t step = kRowTile * kWordElements<S>;
    from -= from % step;
    const int64_t height = to - from, panel = from / kRowTile;
    multiply<T>(height, rows, n_.dim, w_.k + panel * panel_size_a<T>(n_.dim), state.q_columns, 0, n_.dim, w_.s,
                Scratch::ld, false);
    multiply<T>(height, rows, n_.dim_v, w_.v + panel * panel_size_a<T>(n_.dim_v), state.do_columns, 0, n_.dim_v, w_.dp,
                Scratch::ld, false);
    const int64_t first = key + from;
    const bool full = rows % kLanes<C> == 0 && tile.full_begin <= first && first + height <= tile.full_end;
    const bool whole = key <= tile.key_begin && tile.key_end <= key + keys;
    if (softcap_.given()) softcap_.apply(w_.s, w_.slope, height, rows, Scratch::ld);
    if (distant_) distances.apply_transposed(w_.s, product_scale_, state.at, first, height, rows, Scratch::ld);
    if (rewrites_) write_logits(tile, state, bias, first, height, full);
    if (dropout.given()) weigh(tile, dropout, first, height);
    if (softcap_.given() || distant_)
      probabilities<true, true>(state, bias, first, height, rows, whole);
    else if (full || rewrites_)
      probabilities<true, false>(state, bias, first, height, rows, whole);
    else
      probabilities<false, false>(state, bias, first, height, rows, whole);
    if (want_dkv) {
      const int64_t at = first - part_.key_begin;
      multiply<S>(height, n_.dim_v, rows, w_.p, state.do_rows, 0, rows, w_.dv + at * n_.dim_v, n_.dim_v, true);
      multiply<S>(height, n_.dim, rows, w_.ds, state.q_rows, 0, rows, w_.dk + at * n_.dim, n_.dim, true);
      state.odd_do.template add<S>(height, rows, w_.p, 0, w_.dv + at * n_.dim_v, n_.dim_v);
      state.odd_q.template add<S>(height, rows, w_.ds, 0, w_.dk + at * n_.dim, n_.dim);
    }
    if (want_dq && !whole) mean_keys_.add(state, keys, from, height, rows);
    if (want_dq) {
      pack_a<S>(w_.dp, 1, Scratch::ld, rows, height, w_.ds_q);
      multiply<S>(rows, n_.dim, height, w_.ds_q, w_.k_rows, from, keys, state.dq, n_.dim, true);
      w_.odd_k.template add<S>(rows, height, w_.ds_q, from, state.dq, n_.dim);
    }
  }

  // Scores become logits: scaled (unless they are) and biased, -inf where a query does not see a key. `inside`: the
  // intervals hide none.
  void write_logits(const QueryTile& tile, const TileState& state, const BiasTable<C>& bias, int64_t key,
                    int64_t height, bool inside) {
    const bool biased = args_.extras.pair_bias.given();
    const bool patterned = map_.given() && !map_.full(tile, key, key + height);
    for (int64_t i = 0; i < height; ++i) {
      const C* row = biased ? bias.row(bias.row_index(args_.extras.class_k.ptr<int32_t>()[key + i])) : nullptr;
      const Vec<Int> span = splat(static_cast<Int>(patterned ? args_.extras.span_k.ptr<int32_t>()[key + i] : 0));
      const Vec<Int> bit = splat(static_cast<Int>(patterned ? args_.extras.bit_k.ptr<int32_t>()[key + i] : 0));
      for (int64_t c = 0; c < tile.end - tile.begin; c += kLanes<C>) {
        C* s = w_.s + i * Scratch::ld + c;
        Vec<C> logit = load(s) * score_scale_;
        if (biased) logit += look_up(row, state.class_q + c);
        if (!inside) logit = select(visible(state, key + i, c), logit, splat(-FloatTraits<C>::infinity));
        if (patterned) {
          const auto sees =
              (load_as<Int>(state.span + c) == span) | ((load_as<Int>(state.allow + c) & bit) != Vec<Int>{});
          logit = select(sees, logit, splat(-FloatTraits<C>::infinity));
        }
        store(s, logit);
      }
    }
  }

  // Dropout's factors into w_.z and onto dP.
  void weigh(const QueryTile& tile, const Dropout& dropout, int64_t key, int64_t height) {
    const int64_t rows = tile.end - tile.begin;
    const C factor = static_cast<C>(dropout.factor());
    dropout.for_each(tile.begin, rows, key, height,
                     [&](int64_t i, int64_t j, bool kept) { w_.z[j * Scratch::ld + i] = kept ? factor : C{0}; });
    for (int64_t j = 0; j < height; ++j) {
      C *z = w_.z + j * Scratch::ld, *dp = w_.dp + j * Scratch::ld;
      for (int64_t c = rows; c < round_up(rows, kLanes<C>); ++c) z[c] = 0;
      for (int64_t c = 0; c < rows; c += kLanes<C>) store(dp + c, load(dp + c) * load(z + c));
    }
  }

  // From w_.s and w_.dp, `height` keys starting at `key` (rows) and `rows` queries (columns): packs P and dS, stores dS
  // also in w_.dp. `whole`: these are all keys of the queries. With a cap these are times its slope; sums of dS are
  // not.
  template <bool full, bool rich>
  void probabilities(TileState& state, const BiasTable<C>& bias, int64_t key, int64_t height, int64_t rows,
                     bool whole) {
    const bool hides = !full || rewrites_;
    const bool dropped = args_.extras.seed.given(), sums = want_dq && args_.extras.pair_bias.given();
    const int32_t* class_k = args_.extras.class_k.ptr<int32_t>();
    for (int64_t c = 0; c < rows; c += kLanes<C>) {
      Vec<C> inverse = splat(C{1}), delta = load(state.dot + c), shift = load(state.dlse + c);
      if (whole) {
        delta = select(delta - delta == Vec<C>{}, delta, Vec<C>{});  // an infinite out does not imply an infinite delta
        const Vec<C> low = softmax_column<full>(state, key, height, c, delta, inverse);
        store(state.dot + c, delta + low);
        shift -= low;
      } else {
        recall_column<full>(state, key, height, c);
      }
      Vec<C> ds_sum = {}, distance_sum = {}, distance_weight = {};
      for (int64_t i = 0; i < height; ++i) {
        C* dp = w_.dp + i * Scratch::ld + c;
        const Vec<C> term = load(w_.s + i * Scratch::ld + c);
        Vec<C> p = term * inverse, ds = p * (load(dp) - delta + shift);
        if (hides) {  // a hidden pair's term may be multiplied by a NaN
          p = select(term == Scratch::kHidden, Vec<C>{}, p);
          ds = select(term == Scratch::kHidden, Vec<C>{}, ds);
        }
        Vec<C> product_ds = ds;  // by the scaled product of q and k
        if constexpr (rich) {
          if (softcap_.given()) {
            product_ds = ds * load(w_.slope + i * Scratch::ld + c);
            product_ds = select(term == Scratch::kHidden, Vec<C>{}, product_ds);
          }
          if (want_dq && distant_) {
            const Vec<C> distance = Distances<C>::along_queries(state.at + c, key + i);
            distance_sum += ds * distance;
            distance_weight += p * distance;
          }
        }
        if (want_dkv) {
          store_packed(PackedRow<S>(w_.p, rows, i).at(c), dropped ? p * load(w_.z + i * Scratch::ld + c) : p);
          store_packed(PackedRow<S>(w_.ds, rows, i).at(c), product_ds);
        }
        if (sums) {
          C* sum = state.row_sums + bias.row_index(class_k[key + i]) * kQueryTile + c;
          store(sum, load(sum) + ds);
        }
        if (want_dq) store(dp, product_ds);
        ds_sum += ds;
      }
      if (want_dq && !whole) store(state.ds_sum + c, load(state.ds_sum + c) + ds_sum);
      if constexpr (rich) {
        if (want_dq && distant_) {
          store(state.distance_sum + c, load(state.distance_sum + c) + distance_sum);
          store(state.distance_weight + c, load(state.distance_weight + c) + distance_weight);
        }
      }
    }
  }

  // P from the forward's lse.
  template <bool full>
  MMK_INLINE void recall_column(const TileState& state, int64_t key, int64_t height, int64_t c) {
    const Vec<C> lse = load(state.lse + c), lowest = splat(-FloatTraits<C>::infinity);
    for (int64_t i = 0; i < height; ++i) {
      C* s = w_.s + i * Scratch::ld + c;
      const Vec<C> x = load(s);
      Vec<C> p = exp(x * logit_scale_ - lse);
      if (rewrites_) p = select(x == lowest, splat(Scratch::kHidden), p);
      store(s, full ? p : select(visible(state, key + i, c), p, splat(Scratch::kHidden)));
    }
  }

  // P before division by its sum, and the inverse of that sum, from all keys of the queries; returns the correction to
  // `delta`.
  template <bool full>
  MMK_INLINE Vec<C> softmax_column(const TileState& state, int64_t key, int64_t height, int64_t c, Vec<C> delta,
                                   Vec<C>& inverse) {
    const Vec<C> lowest = splat(-FloatTraits<C>::infinity);
    const C sign = logit_scale_ < 0 ? -1 : 1, factor = logit_scale_ * sign;
    Vec<C> shift = lowest, sum = {}, dot = {};
    for (int64_t i = 0; i < height; ++i) {
      const Vec<C> s = load(w_.s + i * Scratch::ld + c) * sign;
      shift = max(shift, full ? s : select(visible(state, key + i, c), s, lowest));
    }
    if (rewrites_ || args_.extras.sink.given()) {
      shift = max(shift, splat(state.sink / factor));
      shift = select(shift == lowest, Vec<C>{}, shift);  // sees nothing: -inf minus 0 stays -inf
      sum = exp(splat(state.sink) - shift * factor);
      dot = -sum * delta;  // the sink's value is 0
    }
    for (int64_t first = 0; first < height; first += kKeysPerSum) {
      Vec<C> part_sum = {}, part_dot = {};
      for (int64_t i = first; i < min64(first + kKeysPerSum, height); ++i) {
        C* s = w_.s + i * Scratch::ld + c;
        const Vec<C> x = load(s) * sign;
        Vec<C> p = exp((x - shift) * factor), product = p * (load(w_.dp + i * Scratch::ld + c) - delta);
        if (rewrites_) p = select(x == lowest, splat(Scratch::kHidden), p);
        if (!full) p = select(visible(state, key + i, c), p, splat(Scratch::kHidden));
        store(s, p);
        if (!full || rewrites_) {
          product = select(p == Scratch::kHidden, Vec<C>{}, product);
          p = select(p == Scratch::kHidden, Vec<C>{}, p);
        }
        part_sum += p;
        part_dot += product;
      }
      sum += part_sum;
      dot += part_dot;
    }
    inverse = select(sum == Vec<C>{}, inverse, inverse / sum);
    return dot * inverse;
  }

  // Which of the queries from column c on see key `key`.
  MMK_INLINE static auto visible(const TileState& state, int64_t key, int64_t c) {
    const Vec<Int> j = splat(static_cast<Int>(key));
    return (load_as<Int>(state.lo + c) <= j) & (j < load_as<Int>(state.hi + c));
  }

  const AttentionBwdArgs& args_;
  const AttentionShape& n_;
  const QueryTile* tiles_;
  const AttentionTask& part_;
  const TileMap map_;
  const SoftCap<C> softcap_;
  const bool distant_;
  const bool rewrites_;  // scores become logits before the softmax; for a sink only where it is none in units of scores
  const C scale_;
  const C product_scale_, score_scale_, logit_scale_;  // what is left of the scale: after the cap, the distances, all
  Scratch w_;
  MeanKeys<T, S> mean_keys_;
};

}  // namespace MMK_ISA
}  // namespace mmk
