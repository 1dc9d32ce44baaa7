// The mean key of each query, estimated from a sample of the keys: corrects dQ where keys come in parts.
#pragma once

#include "attention/attention_cpu_bwd_scratch.h"

namespace mmk {
namespace MMK_ISA {

template <class T, class S>
class MeanKeys {
  using C = ComputeOf<T>;
  using Scratch = BackwardScratch<T, S>;
  using TileState = typename Scratch::TileState;

 public:
  MeanKeys(const AttentionBwdArgs& args, const AttentionShape& shape, Scratch& scratch)
      : args_(args), n_(shape), w_(scratch), step_(scratch.slope != nullptr ? 1 : kKeysPerSample) {}

  // The sample of a key tile.
  void pack(HeadView<T> k, int64_t key, int64_t keys) {
    const HeadView<T> sample{k.row(key), step_ * k.stride};
    const int64_t count = round_up(keys, step_) / step_;
    w_.odd_sample.template pack<C>(sample, 0, count, n_.dim, w_.sample_k);
    for (int64_t i = 0; i < count; ++i) w_.sample_square[i] = square_of(sample.row(i));
  }

  // What rows [from, from + height) of the key tile add to the mean keys of `rows` queries.
  void add(TileState& state, int64_t keys, int64_t from, int64_t height, int64_t rows) {
    const int64_t first = round_up(from, step_) / step_;
    const int64_t count = round_up(from + height, step_) / step_ - first;
    state.in_parts = true;
    if (count == 0) return;
    C* p = w_.s + (first * step_ - from) * Scratch::ld;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < rows; c += kLanes<C>) {
        C* at = p + i * step_ * Scratch::ld + c;
        const Vec<C> term = load(at), seen = select(term == Scratch::kHidden, Vec<C>{}, term);
        store(at, seen);
        store(state.weight + c, load(state.weight + c) + seen);
        store(state.weight_square + c, load(state.weight_square + c) + seen * seen);
        store(state.square_sum + c, load(state.square_sum + c) + seen * w_.sample_square[first + i]);
        if (w_.slope != nullptr) {
          const Vec<C> slope = load(w_.slope + (at - w_.s));
          store(at, select(term == Scratch::kHidden, Vec<C>{}, seen * slope));
        }
      }
    pack_a<C>(p, 1, step_ * Scratch::ld, rows, count, w_.sample_p);
    multiply<C>(rows, n_.dim, count, w_.sample_p, w_.sample_k, first, round_up(keys, step_) / step_, state.key_sum,
                n_.dim, state.sampled);
    state.sampled = true;
  }

  // Where the keys came in parts, delta used the rounded out, and the sum of dS reveals its error: dS lacks P times the
  // error, and dQ the error times the query's mean key, which matters where the keys have a common mean. The sampled
  // keys estimate it, shrunk towards 0 according to their spread (James and Stein), which a single key does not tell;
  // for a query without two, which has few keys as a rule, its first ones are used. With a soft cap dQ has the error
  // times the mean of slope times key, which no sample tells where most slopes are 0: every key is used.
  void settle(TileState& state, int64_t rows, HeadView<T> k) {
    for (int64_t i = 0; i < rows; ++i) {
      const C sink = args_.extras.sink.given() ? exp(splat(state.sink - state.lse[i]))[0] : C{0};  // its P
      const C rest = state.ds_sum[i] - (sink * state.dot[i] + (1 - sink) * state.dlse[i]);
      const C weight = state.weight[i], pairs = weight * weight - state.weight_square[i];
      const int64_t first = -min64(0, -static_cast<int64_t>(state.lo[i]));
      const int64_t end = min64(n_.num_keys, static_cast<int64_t>(state.hi[i]));
      if (!(rest - rest == 0) || first >= end) continue;  // infinite, or sees nothing
      C* dq = state.dq + i * n_.dim;
      if (w_.slope != nullptr) {
        if (!(weight > 0)) continue;
        correct(state, i, rest);
        subtract(dq, rest * (1 - sink) / weight, state.key_sum + i * n_.dim);
        continue;
      }
      if (pairs > weight * weight * kLeastPairs) {
        correct(state, i, rest);
        const C *key_sum = state.key_sum + i * n_.dim, square = square_of(key_sum);
        const C spread = state.square_sum[i] * weight - square;  // below 0 by rounding alone
        const C noise = spread > 0 ? spread * state.weight_square[i] : C{0};
        if (noise < square * pairs) subtract(dq, rest * (1 - sink) / weight * (1 - noise / (square * pairs)), key_sum);
      } else if (!args_.extras.tiles.given()) {
        C* mean = state.key_sum + i * n_.dim;
        const int64_t count = min64(end - first, kKeysPerSample);
        clear(mean, n_.dim);
        for (int64_t j = 0; j < count; ++j) subtract(mean, C{-1} / count, k.row(first + j));
        if (!(square_of(mean) < FloatTraits<C>::infinity)) continue;
        correct(state, i, rest);
        subtract(dq, rest * (1 - sink), mean);
      } else if (weight > 0) {
        correct(state, i, rest);
      }
    }
  }

 private:
  // Of the weight's square: below, nearly all weight is on one sampled key.
  static constexpr C kLeastPairs = static_cast<C>(0.01);

  void correct(TileState& state, int64_t i, C rest) const {
    state.dot[i] += rest;
    if (args_.extras.at_q.given()) state.distance_sum[i] -= rest * state.distance_weight[i];
  }

  // |x|^2 of D elements.
  template <class E>
  C square_of(const E* x) const {
    Vec<C> sum = {};
    for (int64_t d = 0; d < n_.dim; d += kLanes<C>) {
      const Vec<C> part = load_n(x + d, min64(kLanes<C>, n_.dim - d));
      sum += part * part;
    }
    return reduce_add(sum);
  }

  // x -= factor * y, of D elements.
  template <class E>
  void subtract(C* x, C factor, const E* y) const {
    for (int64_t d = 0; d < n_.dim; d += kLanes<C>) {
      const int64_t left = min64(kLanes<C>, n_.dim - d);
      store_n(x + d, load_n(x + d, left) - load_n(y + d, left) * factor, left);
    }
  }

  const AttentionBwdArgs& args_;
  const AttentionShape& n_;
  Scratch& w_;
  const int64_t step_;  // one key in this many is sampled
};

}  // namespace MMK_ISA
}  // namespace mmk
