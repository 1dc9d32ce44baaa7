// Backward of additive attention on the CPU, in two passes, so that no sum has two owners: tasks that own queries for
// dq and their share of dw, then tasks that own a tile of keys of a key/value head for dk and dv. Each keeps the tanh
// of one query against a tile in a buffer [D, kKeys]: it is needed for the score and, once ds is known, for the
// gradients.
#pragma once

#include "attention/additive_cpu_tile.h"

namespace mmk {
namespace MMK_ISA {
namespace additive {

// Of one query against a tile of keys: its probabilities and the gradient of its scores. Both passes go through here,
// with the same operations in the same order.
template <class T>
struct Pairs {
  using C = ComputeOf<T>;

  static int64_t scratch(const Sizes& n) {
    return (2 * n.dim + n.dim_v + 2) * kKeys + padded(n.dim) + 2 * padded(most(n.dim, n.dim_v));
  }

  Pairs(const AdditiveBwdArgs& args, const Sizes& sizes, const Mask& visible, int64_t kv_head, C* memory)
      : args(args),
        n(sizes),
        mask(visible),
        k(args.k, kv_head),
        v(args.v, kv_head),
        kt(memory),
        t(kt + n.dim * kKeys),
        vt(t + n.dim * kKeys),
        p(vt + n.dim_v * kKeys),
        ds(p + kKeys),
        qb(ds + kKeys),
        row(qb + padded(n.dim)),
        grad(row + padded(most(n.dim, n.dim_v))) {}

  void load_keys(int64_t key, int64_t keys) {
    transpose_tile(k, key, keys, n.dim, row, kt);
    transpose_tile(v, key, keys, n.dim_v, row, vt);
  }

  // q + bias, the gradient of out, and delta of query i.
  C load_query(int64_t i, int64_t head) {
    const HeadRows<T> q(args.q, head), out(args.out, head), grad_out(args.grad_out, head);
    const C* bias = args.bias.template ptr<const C>() + head * n.dim;
    each_vector<C>(n.dim, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      write(qb + d, read(q.row(i) + d, count) + read(bias + d, count), count);
    });
    Vec<C> sum = {};
    each_vector<C>(n.dim_v, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      const auto g = read(grad_out.row(i) + d, count);
      write(grad + d, g, count);
      sum += g * read(out.row(i) + d, count);
    });
    const C dlse = args.grad_lse.given() ? args.grad_lse.template ptr<const C>()[head * n.num_queries + i] : 0;
    return reduce_add(sum) - dlse;
  }

  // p and ds for the whole vectors around [at.begin, at.end), zero where nothing is seen; t for all of them.
  void differentiate(int64_t i, int64_t head, int64_t key, Interval at, C delta) {
    constexpr int64_t L = kLanes<C>;
    const C lse = args.lse.template ptr<const C>()[head * n.num_queries + i];
    score(qb, args.w.template ptr<const C>() + head * n.dim, kt, n.dim, at.begin, at.end, p, t);
    blank(mask, i, key, at, p);
    for (int64_t j = at.begin / L * L; j < at.end; j += L) {
      Vec<C> dp = {};
      for (int64_t d = 0; d < n.dim_v; ++d) dp += load(vt + d * kKeys + j) * grad[d];
      // By comparison, for lse may be -inf (the pattern hides all keys) or NaN, which only the keys seen may meet.
      const Vec<C> s = load(p + j), x = select(s == -FloatTraits<C>::infinity, Vec<C>{}, exp(s - lse));
      store(p + j, x);
      store(ds + j, select(x == C(0), Vec<C>{}, x * (dp - delta)));
    }
  }

  const AdditiveBwdArgs& args;
  const Sizes& n;
  const Mask& mask;
  const HeadRows<T> k, v;
  C *kt, *t, *vt;  // [D, kKeys], [D, kKeys], [Dv, kKeys]
  C *p, *ds;       // [kKeys]
  C *qb, *row, *grad;
};

// dq of queries [first, last) of a head, and their share of dw.
template <class T, class C = ComputeOf<T>>
void query_gradients(Pairs<T> pairs, int64_t head, int64_t first, int64_t last, C* dw) {
  constexpr int64_t L = kLanes<C>;
  const Sizes& n = pairs.n;
  const C* w = pairs.args.w.template ptr<const C>() + head * n.dim;
  C* dq = pairs.args.dq.template ptr<C>() + head * n.dim;
  const int64_t row = n.heads * n.dim;
  for (int64_t i = first; i < last; ++i)
    for (int64_t d = 0; d < n.dim; ++d) dq[i * row + d] = 0;
  for (int64_t d = 0; d < n.dim; ++d) dw[d] = 0;
  const Interval hull = hull_of_keys(pairs.mask, first, last);
  for (int64_t key = hull.begin; key < hull.end; key += kKeys) {
    const int64_t keys = least(kKeys, hull.end - key);
    bool packed = false;
    for (int64_t i = first; i < last; ++i) {
      const Interval at = columns(pairs.mask, i, key, keys);
      if (at.empty()) continue;
      if (!packed) pairs.load_keys(key, keys);
      packed = true;
      pairs.differentiate(i, head, key, at, pairs.load_query(i, head));
      for (int64_t d = 0; d < n.dim; ++d) {
        Vec<C> slope = {}, value = {};
        for (int64_t j = at.begin / L * L; j < at.end; j += L) {
          const Vec<C> ds = load(pairs.ds + j), t = load(pairs.t + d * kKeys + j);
          value += ds * t;
          slope += ds * ((C(1) - t) * (C(1) + t));
        }
        dq[i * row + d] += reduce_add(slope) * w[d];
        dw[d] += reduce_add(value);
      }
    }
  }
}

// dk and dv of keys [key, key + keys) of a key/value head. `dkt` [D, kKeys] and `dvt` [Dv, kKeys] are their sums.
template <class T, class C = ComputeOf<T>>
void key_gradients(Pairs<T> pairs, int64_t kv_head, int64_t key, int64_t keys, C* dkt, C* dvt) {
  constexpr int64_t L = kLanes<C>;
  const Sizes& n = pairs.n;
  for (int64_t x = 0; x < n.dim * kKeys; ++x) dkt[x] = 0;
  for (int64_t x = 0; x < n.dim_v * kKeys; ++x) dvt[x] = 0;
  const Interval hull = hull_of_queries(pairs.mask, key, key + keys);
  if (!hull.empty()) pairs.load_keys(key, keys);
  for (int64_t head = kv_head * n.group(); head < (kv_head + 1) * n.group(); ++head) {
    const C* w = pairs.args.w.template ptr<const C>() + head * n.dim;
    for (int64_t i = hull.begin; i < hull.end; ++i) {
      const Interval at = columns(pairs.mask, i, key, keys);
      if (at.empty()) continue;
      pairs.differentiate(i, head, key, at, pairs.load_query(i, head));
      for (int64_t j = at.begin / L * L; j < at.end; j += L) {
        const Vec<C> p = load(pairs.p + j), ds = load(pairs.ds + j);
        for (int64_t d = 0; d < n.dim; ++d) {
          const Vec<C> t = load(pairs.t + d * kKeys + j);
          C* sum = dkt + d * kKeys + j;
          store(sum, load(sum) + ds * w[d] * ((C(1) - t) * (C(1) + t)));
        }
        for (int64_t d = 0; d < n.dim_v; ++d) {
          C* sum = dvt + d * kKeys + j;
          store(sum, load(sum) + select(p == C(0), Vec<C>{}, p * pairs.grad[d]));
        }
      }
    }
  }
  const auto write_rows = [&](const C* sums, int64_t width, const Tensor& to) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t d = 0; d < width; ++d) pairs.row[d] = sums[d * kKeys + j];
      T* row = to.ptr<T>() + ((key + j) * n.kv_heads + kv_head) * width;
      each_vector<C>(width, [&](int64_t d, int64_t count)
                                __attribute__((always_inline)) { write(row + d, read(pairs.row + d, count), count); });
    }
  };
  write_rows(dkt, n.dim, pairs.args.dk);
  write_rows(dvt, n.dim_v, pairs.args.dv);
}

template <class T>
void backward(const AdditiveBwdArgs& args, int num_threads) {
  using C = ComputeOf<T>;
  const Sizes n(args);
  const Mask mask(args.mask, n);
  const int64_t query_tiles = (n.num_queries + kQueries - 1) / kQueries, key_tiles = (n.num_keys + kKeys - 1) / kKeys;
  const int64_t pairs = padded(Pairs<T>::scratch(n)), scratch = pairs + (n.dim + n.dim_v) * kKeys;
  const int64_t tasks = most(query_tiles * n.heads, key_tiles * n.kv_heads);
  AlignedBuffer<C> memory(scratch * usable_threads(tasks, num_threads));
  AlignedBuffer<C> dw(query_tiles * n.heads * n.dim);
  parallel_for(query_tiles * n.heads, num_threads, [&](int64_t task, int thread) {
    const int64_t head = task % n.heads, first = task / n.heads * kQueries;
    query_gradients(Pairs<T>(args, n, mask, head / n.group(), memory.data() + thread * scratch), head, first,
                    least(first + kQueries, n.num_queries), dw.data() + task * n.dim);
  });
  parallel_for(key_tiles * n.kv_heads, num_threads, [&](int64_t task, int thread) {
    const int64_t kv_head = task % n.kv_heads, key = task / n.kv_heads * kKeys;
    C* const mine = memory.data() + thread * scratch;
    key_gradients(Pairs<T>(args, n, mask, kv_head, mine), kv_head, key, least(kKeys, n.num_keys - key), mine + pairs,
                  mine + pairs + n.dim * kKeys);
  });
  sum_lines(dw.data(), query_tiles, n.heads * n.dim, n.heads * n.dim, args.dw.ptr<C>());
}

}  // namespace additive
}  // namespace MMK_ISA
}  // namespace mmk
