// Backward of additive attention on the CPU, in two passes, so that every sum has one owner: tasks that own queries
// compute dq and their share of dw, then tasks that own a key tile of a key/value head compute dk and dv. Each keeps
// the tanh of one query against a tile in a buffer [D, kKeys]: the score needs it and, once ds is known, the gradients.
//
// delta from the rounded out has a rounding error that is the same for all keys of a query, so sums over keys do not
// average it out. The sum of ds reveals it: dq and dw are corrected with the sums of p instead of ds, and the second
// pass uses the corrected delta.
#pragma once

#include "attention/additive_cpu_tile.h"

namespace mmk {
namespace MMK_ISA {
namespace additive {

// Probabilities and score gradients of one query against a key tile. Both passes use it, so that they perform the same
// operations in the same order.
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

  // q + bias and the gradient of out of query i.
  void load_query(int64_t i, int64_t head) {
    const HeadRows<T> q(args.q, head), grad_out(args.grad_out, head);
    const C* bias = args.bias.template ptr<const C>() + head * n.dim;
    each_vector<C>(n.dim, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      write(qb + d, read(q.row(i) + d, count) + read(bias + d, count), count);
    });
    each_vector<C>(n.dim_v, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      write(grad + d, read(grad_out.row(i) + d, count), count);
    });
  }

  C dlse(int64_t i, int64_t head) const {
    return args.grad_lse.given() ? args.grad_lse.template ptr<const C>()[head * n.num_queries + i] : 0;
  }

  // <do, out> - dlse of query i.
  C delta(int64_t i, int64_t head) const {
    const HeadRows<T> out(args.out, head), grad_out(args.grad_out, head);
    Vec<C> sum = {};
    each_vector<C>(n.dim_v, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      sum += read(grad_out.row(i) + d, count) * read(out.row(i) + d, count);
    });
    return reduce_add(sum) - dlse(i, head);
  }

  // p and ds for the whole vectors around [at.begin, at.end), zero where not visible; t for all of them.
  void differentiate(int64_t i, int64_t head, int64_t key, Interval at, C delta) {
    constexpr int64_t L = kLanes<C>;
    const C lse = args.lse.template ptr<const C>()[head * n.num_queries + i];
    score(qb, args.w.template ptr<const C>() + head * n.dim, kt, n.dim, at.begin, at.end, p, t);
    blank(mask, i, key, at, p);
    for (int64_t j = at.begin / L * L; j < at.end; j += L) {
      Vec<C> dp = {};
      for (int64_t d = 0; d < n.dim_v; ++d) dp += load(vt + d * kKeys + j) * grad[d];
      // By comparison, because lse may be -inf (the pattern hides all keys) or NaN, which must reach only visible keys.
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

// One key tile in this many is sampled for sums that only correct a rounding error.
constexpr int64_t kTilesPerSample = 4;

// A task's per-query sums besides dq and dw: ds over all keys; p, p (1 - t^2) and p t over the sampled ones.
template <class T>
struct QuerySums {
  using C = ComputeOf<T>;

  static int64_t scratch(int64_t dim) { return kQueries * (2 * dim + 2); }

  QuerySums(int64_t dim, C* memory) : ds(memory), p(ds + kQueries), slope(p + kQueries), value(slope + kQueries * dim) {
    for (int64_t x = 0; x < scratch(dim); ++x) memory[x] = 0;
  }

  void sample(const Pairs<T>& pairs, int64_t r, Interval at) {
    constexpr int64_t L = kLanes<C>;
    const int64_t dim = pairs.n.dim;
    Vec<C> all = {};
    for (int64_t j = at.begin / L * L; j < at.end; j += L) all += load(pairs.p + j);
    p[r] += reduce_add(all);
    for (int64_t d = 0; d < dim; ++d) {
      Vec<C> of_slope = {}, of_value = {};
      for (int64_t j = at.begin / L * L; j < at.end; j += L) {
        const Vec<C> weight = load(pairs.p + j), t = load(pairs.t + d * kKeys + j);
        of_value += weight * t;
        of_slope += weight * ((C(1) - t) * (C(1) + t));
      }
      slope[r * dim + d] += reduce_add(of_slope);
      value[r * dim + d] += reduce_add(of_value);
    }
  }

  C *ds, *p;         // [kQueries]
  C *slope, *value;  // [kQueries, D]
};

// dq of queries [first, last) of a head, their share of dw, and their deltas [Tq].
template <class T, class C = ComputeOf<T>>
void query_gradients(Pairs<T> pairs, int64_t head, int64_t first, int64_t last, QuerySums<T> sums, C* dw, C* delta) {
  constexpr int64_t L = kLanes<C>;
  const Sizes& n = pairs.n;
  const C* w = pairs.args.w.template ptr<const C>() + head * n.dim;
  C* dq = pairs.args.dq.template ptr<C>() + head * n.dim;
  const int64_t row = n.heads * n.dim;
  for (int64_t i = first; i < last; ++i) {
    delta[i] = pairs.delta(i, head);
    for (int64_t d = 0; d < n.dim; ++d) dq[i * row + d] = 0;
  }
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
      pairs.load_query(i, head);
      pairs.differentiate(i, head, key, at, delta[i]);
      Vec<C> all = {};
      for (int64_t j = at.begin / L * L; j < at.end; j += L) all += load(pairs.ds + j);
      sums.ds[i - first] += reduce_add(all);
      if (sums.p[i - first] == 0 || (key - hull.begin) / kKeys % kTilesPerSample == 0)
        sums.sample(pairs, i - first, at);
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
  for (int64_t i = first; i < last; ++i) {
    const int64_t r = i - first;
    const C rest = sums.ds[r] - pairs.dlse(i, head);
    if (!(sums.p[r] > 0) || !(rest - rest == 0)) continue;  // no visible key, or infinite
    delta[i] += rest;
    const C weight = rest / sums.p[r];
    for (int64_t d = 0; d < n.dim; ++d) {
      dq[i * row + d] -= weight * sums.slope[r * n.dim + d] * w[d];
      dw[d] -= weight * sums.value[r * n.dim + d];
    }
  }
}

// dk and dv of keys [key, key + keys) of a key/value head, given the deltas [H, Tq]. `total` [D + Dv, kKeys] holds the
// sums, `part` (same shape) those over the last few queries.
template <class T, class C = ComputeOf<T>>
void key_gradients(Pairs<T> pairs, int64_t kv_head, int64_t key, int64_t keys, const C* deltas, C* total, C* part) {
  constexpr int64_t L = kLanes<C>;
  const Sizes& n = pairs.n;
  const int64_t size = (n.dim + n.dim_v) * kKeys;
  C *const dkt = part, *const dvt = part + n.dim * kKeys;
  for (int64_t x = 0; x < size; ++x) total[x] = part[x] = 0;
  int64_t terms = 0;
  const Interval hull = hull_of_queries(pairs.mask, key, key + keys);
  if (!hull.empty()) pairs.load_keys(key, keys);
  for (int64_t head = kv_head * n.group(); head < (kv_head + 1) * n.group(); ++head) {
    const C* w = pairs.args.w.template ptr<const C>() + head * n.dim;
    for (int64_t i = hull.begin; i < hull.end; ++i) {
      const Interval at = columns(pairs.mask, i, key, keys);
      if (at.empty()) continue;
      pairs.load_query(i, head);
      pairs.differentiate(i, head, key, at, deltas[head * n.num_queries + i]);
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
      if (++terms % kRowsPerPart == 0) add_part(part, total, size);
    }
  }
  add_part(part, total, size);
  const auto write_rows = [&](const C* sums, int64_t width, const Tensor& to) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t d = 0; d < width; ++d) pairs.row[d] = sums[d * kKeys + j];
      T* row = to.ptr<T>() + ((key + j) * n.kv_heads + kv_head) * width;
      each_vector<C>(width, [&](int64_t d, int64_t count)
                                __attribute__((always_inline)) { write(row + d, read(pairs.row + d, count), count); });
    }
  };
  write_rows(total, n.dim, pairs.args.dk);
  write_rows(total + n.dim * kKeys, n.dim_v, pairs.args.dv);
}

template <class T>
void backward(const AdditiveBwdArgs& args, int num_threads) {
  using C = ComputeOf<T>;
  const Sizes n(args);
  const Mask mask(args.mask, n);
  const int64_t query_tiles = (n.num_queries + kQueries - 1) / kQueries, key_tiles = (n.num_keys + kKeys - 1) / kKeys;
  const int64_t pairs = padded(Pairs<T>::scratch(n));
  const int64_t sums = (n.dim + n.dim_v) * kKeys;
  const int64_t scratch = pairs + most(2 * sums, padded(QuerySums<T>::scratch(n.dim)));
  const int64_t tasks = most(query_tiles * n.heads, key_tiles * n.kv_heads);
  AlignedBuffer<C> memory(scratch * usable_threads(tasks, num_threads));
  AlignedBuffer<C> dw(query_tiles * n.heads * n.dim), delta(n.heads * n.num_queries);
  parallel_for(query_tiles * n.heads, num_threads, [&](int64_t task, int thread) {
    const int64_t head = task % n.heads, first = task / n.heads * kQueries;
    C* const mine = memory.data() + thread * scratch;
    query_gradients(Pairs<T>(args, n, mask, head / n.group(), mine), head, first,
                    least(first + kQueries, n.num_queries), QuerySums<T>(n.dim, mine + pairs), dw.data() + task * n.dim,
                    delta.data() + head * n.num_queries);
  });
  parallel_for(key_tiles * n.kv_heads, num_threads, [&](int64_t task, int thread) {
    const int64_t kv_head = task % n.kv_heads, key = task / n.kv_heads * kKeys;
    C* const mine = memory.data() + thread * scratch;
    key_gradients(Pairs<T>(args, n, mask, kv_head, mine), kv_head, key, least(kKeys, n.num_keys - key), delta.data(),
                  mine + pairs, mine + pairs + sums);
  });
  sum_lines(dw.data(), query_tiles, n.heads * n.dim, n.heads * n.dim, args.dw.ptr<C>());
}

}  // namespace additive
}  // namespace MMK_ISA
}  // namespace mmk
