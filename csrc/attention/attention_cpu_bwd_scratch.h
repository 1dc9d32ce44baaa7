// Scratch memory of a CPU backward task.
#pragma once

#include "attention/attention_cpu_odd_rows.h"
#include "attention/attention_cpu_scores.h"

namespace mmk {
namespace MMK_ISA {

// Large enough to hold whole segments of 256.
constexpr int64_t kGradientKeyTile = 256;
// Sums over keys are split into partial sums of this many: equal terms in one long sum round in the same direction.
constexpr int64_t kKeysPerSum = 16;
// One key in this many is sampled for a query's mean key; every key with a soft cap.
constexpr int64_t kKeysPerSample = 64;

template <class C>
void clear(C* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(C));
}

template <class T, class S>
struct BackwardScratch {
  using C = ComputeOf<T>;
  using Int = typename IntOf<C>::type;
  static constexpr int64_t ld = kQueryTile + kLanes<C>;
  // Marks a hidden pair's term in s; a visible one's is an exponential, or NaN.
  static constexpr C kHidden = -1;

  struct TileState {
    Packed<T>*q_columns, *do_columns;  // B [D, queries], B [Dv, queries]
    Packed<S>*q_rows, *do_rows;        // B [queries, D], B [queries, Dv]
    OddRows<T> odd_q, odd_do;
    C *lse, *dot, *dlse;  // [queries]; dot: delta without dlse
    Int *lo, *hi;         // [queries]
    C* dq;                // [queries, D]
    C* ds_sum;            // [queries] over all keys
    // Over the sampled keys: sums of P, P^2, P |k|^2 and P k.
    C *weight, *weight_square, *square_sum, *key_sum;  // [queries], [queries], [queries], [queries, D]
    bool sampled, in_parts;
    // Only with a pattern or a bias:
    Int *span, *allow, *class_q;  // [queries]
    C* row_sums;                  // [Ck + 1, queries]
    C sink;                       // -inf: none
    // Only with distances: positions, sums of dS and of P times distance.
    Int* at;                            // [queries]
    C *distance_sum, *distance_weight;  // [queries]
  };
  TileState tile[kTilesPerTask];
  Packed<T>* out_columns;  // B [Dv, queries]
  Packed<T>*k, *v;         // A [keys, D], A [keys, Dv]
  Packed<S>* k_rows;       // B [keys, D]
  OddRows<T> odd_k;
  Packed<C>* sample_k;  // B [sampled keys, D]
  OddRows<T> odd_sample;
  C* sample_square;     // [sampled keys] |k|^2
  Packed<C>* sample_p;  // A [queries, sampled keys]
  C *s, *dp;            // [keys, ld]
  Packed<S>*p, *ds;     // A [keys, queries]
  Packed<S>* ds_q;      // A [queries, keys]
  C *dk, *dv;           // [key_range, D], [key_range, Dv]
  C* bias;
  C* z;      // [keys, ld]: dropout's factors
  C* slope;  // [keys, ld]: derivatives of the soft cap; null without one

  BackwardScratch(Arena& arena, const AttentionShape& n, const AttentionExtras& extras, int64_t key_range) {
    const int64_t pattern = extras.tiles.given() ? kQueryTile : 0, biased = extras.pair_bias.given() ? kQueryTile : 0;
    const int64_t distant = extras.at_q.given() ? kQueryTile : 0;
    const int64_t samples = extras.softcap > 0 ? kGradientKeyTile : kGradientKeyTile / kKeysPerSample;
    for (TileState& t : tile) {
      t.q_columns = arena.take<Packed<T>>(packed_size_b<T>(kQueryTile, n.dim));
      t.do_columns = arena.take<Packed<T>>(packed_size_b<T>(kQueryTile, n.dim_v));
      t.q_rows = arena.take<Packed<S>>(packed_size_b<S>(n.dim, kQueryTile));
      t.do_rows = arena.take<Packed<S>>(packed_size_b<S>(n.dim_v, kQueryTile));
      t.lse = arena.take<C>(kQueryTile);
      t.dot = arena.take<C>(kQueryTile);
      t.dlse = arena.take<C>(kQueryTile);
      t.lo = arena.take<Int>(kQueryTile);
      t.hi = arena.take<Int>(kQueryTile);
      t.dq = arena.take<C>(kQueryTile * n.dim);
      t.ds_sum = arena.take<C>(kQueryTile);
      t.weight = arena.take<C>(kQueryTile);
      t.weight_square = arena.take<C>(kQueryTile);
      t.square_sum = arena.take<C>(kQueryTile);
      t.key_sum = arena.take<C>(kQueryTile * n.dim);
      t.span = arena.take<Int>(pattern);
      t.allow = arena.take<Int>(pattern);
      t.class_q = arena.take<Int>(biased);
      t.at = arena.take<Int>(distant);
      t.distance_sum = arena.take<C>(distant);
      t.distance_weight = arena.take<C>(distant);
      t.row_sums = arena.take<C>(biased * (extras.pair_bias.size[2] + 1));
    }
    out_columns = arena.take<Packed<T>>(packed_size_b<T>(kQueryTile, n.dim_v));
    k = arena.take<Packed<T>>(packed_size_a<T>(kGradientKeyTile, n.dim));
    v = arena.take<Packed<T>>(packed_size_a<T>(kGradientKeyTile, n.dim_v));
    k_rows = arena.take<Packed<S>>(packed_size_b<S>(n.dim, kGradientKeyTile));
    sample_k = arena.take<Packed<C>>(packed_size_b<C>(n.dim, samples));
    sample_square = arena.take<C>(samples);
    sample_p = arena.take<Packed<C>>(packed_size_a<C>(kQueryTile, samples));
    s = arena.take<C>(kGradientKeyTile * ld);
    dp = arena.take<C>(kGradientKeyTile * ld);
    p = arena.take<Packed<S>>(packed_size_a<S>(kGradientKeyTile, kQueryTile));
    ds = arena.take<Packed<S>>(packed_size_a<S>(kGradientKeyTile, kQueryTile));
    ds_q = arena.take<Packed<S>>(packed_size_a<S>(kQueryTile, kGradientKeyTile));
    dk = arena.take<C>(key_range * n.dim);
    dv = arena.take<C>(key_range * n.dim_v);
    bias = arena.take<C>(biased > 0 ? BiasTable<C>::kSize : 0);
    z = arena.take<C>(extras.seed.given() ? kGradientKeyTile * ld + Dropout::kWide * ld : 0);
    slope = extras.softcap > 0 ? arena.take<C>(kGradientKeyTile * ld) : nullptr;
  }
};

}  // namespace MMK_ISA
}  // namespace mmk
