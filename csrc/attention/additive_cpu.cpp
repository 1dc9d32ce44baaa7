// Additive attention on the CPU. Vectors run along the keys: a tile of kKeys of them is transposed once and scored by
// the queries one after the other, each with one tanh per key and element of the head dim. All in the compute type.
//
//   forward   a task owns kQueries queries of a head and walks the hull of their keys; online softmax
//   backward  two passes, so that no sum has two owners: tasks that own queries for dq and their share of dw, then
//   tasks
//             that own a tile of keys of a key/value head for dk and dv. Each keeps the tanh of one query against a
//             tile in a buffer [D, kKeys]: it is needed for the score and, once ds is known, for the gradients.
#include "attention/additive.h"

#include "attention/rows.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kQueries = 32, kKeys = 64;
constexpr int64_t kTerms = 8;  // that are summed before they join a longer sum: nearly pairwise

MMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Sizes {
  int64_t num_queries, num_keys, heads, kv_heads, dim, dim_v;
  template <class Args>
  explicit Sizes(const Args& args)
      : num_queries(args.q.size[0]),
        num_keys(args.k.size[0]),
        heads(args.q.size[1]),
        kv_heads(args.k.size[1]),
        dim(args.q.size[2]),
        dim_v(args.v.size[2]) {}
  int64_t group() const { return heads / kv_heads; }
};

// [T, heads, D] with unit stride along D.
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  HeadRows(const Tensor& x, int64_t head) : base(x.ptr<const T>() + head * x.stride[1]), stride(x.stride[0]) {}
  const T* row(int64_t t) const { return base + t * stride; }
};

// A mask's vectors, with every interval inside the keys there are.
struct Mask {
  const int32_t *lo, *hi, *first_q, *last_q, *span_q, *span_k, *allow_q, *bit_k;
  int64_t num_queries, num_keys;
  Mask(const AdditiveMask& m, const Sizes& n)
      : lo(m.lo.ptr<int32_t>()),
        hi(m.hi.ptr<int32_t>()),
        first_q(m.first_q.ptr<int32_t>()),
        last_q(m.last_q.ptr<int32_t>()),
        span_q(m.span_q.ptr<int32_t>()),
        span_k(m.span_k.ptr<int32_t>()),
        allow_q(m.allow_q.ptr<int32_t>()),
        bit_k(m.bit_k.ptr<int32_t>()),
        num_queries(n.num_queries),
        num_keys(n.num_keys) {}
  int64_t begin(int64_t i) const { return most(lo[i], 0); }
  int64_t end(int64_t i) const { return least(hi[i], num_keys); }
  bool sees(int64_t i, int64_t j) const {
    return span_q == nullptr || span_q[i] == span_k[j] || (allow_q[i] & bit_k[j]) != 0;
  }
};

struct Interval {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// What queries [first, last) see together.
Interval hull_of_keys(const Mask& mask, int64_t first, int64_t last) {
  Interval all{mask.num_keys, 0};
  for (int64_t i = first; i < last; ++i)
    if (mask.begin(i) < mask.end(i)) all = {least(all.begin, mask.begin(i)), most(all.end, mask.end(i))};
  return all;
}
Interval hull_of_queries(const Mask& mask, int64_t first, int64_t last) {
  Interval all{mask.num_queries, 0};
  for (int64_t j = first; j < last; ++j) {
    const int64_t from = most(mask.first_q[j], 0), to = least(mask.last_q[j], mask.num_queries);
    if (from < to) all = {least(all.begin, from), most(all.end, to)};
  }
  return all;
}

// dst[d][j] = row first + j of x, zeros from `count` on: [width, kKeys]. `row` holds one row.
template <class T, class C>
void transpose_tile(HeadRows<T> x, int64_t first, int64_t count, int64_t width, C* row, C* dst) {
  for (int64_t j = 0; j < kKeys; ++j) {
    if (j < count) {
      each_vector<C>(width, [&](int64_t d, int64_t n)
                                __attribute__((always_inline)) { write(row + d, read(x.row(first + j) + d, n), n); });
      for (int64_t d = 0; d < width; ++d) dst[d * kKeys + j] = row[d];
    } else {
      for (int64_t d = 0; d < width; ++d) dst[d * kKeys + j] = 0;
    }
  }
}

// dst[j][d] = x[first + j][d] in the compute type, rows `ld` apart.
template <class T, class C>
void widen_tile(HeadRows<T> x, int64_t first, int64_t count, int64_t width, int64_t ld, C* dst) {
  for (int64_t j = 0; j < count; ++j)
    each_vector<C>(width, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      write(dst + j * ld + d, read(x.row(first + j) + d, n), n);
    });
}

// s[j] = sum_d w[d] tanh(q[d] + k[d][j]) for the whole vectors that cover [from, to); keeps the tanh in t, if given.
// A NaN is kept in s alone: one of a key that the query does not see must not reach a sum through 0 * NaN.
template <class C>
void score(const C* q, const C* w, const C* k, int64_t dim, int64_t from, int64_t to, C* s, C* t) {
  for (int64_t j = from / kLanes<C> * kLanes<C>; j < to; j += kLanes<C>) {
    Vec<C> sum = {};
    for (int64_t first = 0; first < dim; first += kTerms) {
      Vec<C> part = {};
      for (int64_t d = first; d < least(first + kTerms, dim); ++d) {
        const auto x = tanh(load(k + d * kKeys + j) + q[d]);
        if (t != nullptr) store(t + d * kKeys + j, select(x == x, x, Vec<C>{}));
        part += x * w[d];
      }
      sum += part;
    }
    store(s + j, sum);
  }
}

// What is left of a query's interval in the tile of keys that begins at `key`: columns [from, to).
MMK_INLINE Interval columns(const Mask& mask, int64_t i, int64_t key, int64_t keys) {
  return {most(mask.begin(i) - key, 0), least(mask.end(i) - key, keys)};
}

// Scores outside [from, to) or the pattern become -inf, whole vectors around them too.
template <class C>
void blank(const Mask& mask, int64_t i, int64_t key, Interval at, C* s) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t j = at.begin / L * L; j < (at.end + L - 1) / L * L; ++j)
    if (j < at.begin || j >= at.end || !mask.sees(i, key + j)) s[j] = -FloatTraits<C>::infinity;
}

template <class T>
class ForwardTask {
  using C = ComputeOf<T>;

 public:
  static int64_t scratch(const Sizes& n) {
    const int64_t ld = padded(n.dim_v);
    return n.dim * kKeys + kKeys * ld + kKeys + padded(most(n.dim, n.dim_v)) + kQueries * (padded(n.dim) + ld + 2 * 16);
  }

  ForwardTask(const AdditiveFwdArgs& args, const Sizes& n, const Mask& mask, int64_t head, C* memory)
      : n_(n),
        mask_(mask),
        q_(args.q, head),
        k_(args.k, head / n.group()),
        v_(args.v, head / n.group()),
        w_(args.w.ptr<const C>() + head * n.dim),
        bias_(args.bias.ptr<const C>() + head * n.dim),
        out_(args.out.ptr<T>() + head * n.dim_v),
        lse_(args.lse.ptr<C>() + head * n.num_queries),
        ld_(padded(n.dim_v)),
        kt_(memory),
        vt_(kt_ + n.dim * kKeys),
        s_(vt_ + kKeys * ld_),
        row_(s_ + kKeys),
        qb_(row_ + padded(most(n.dim, n.dim_v))),
        acc_(qb_ + kQueries * padded(n.dim)),
        max_(acc_ + kQueries * ld_),
        sum_(max_ + kQueries) {}

  void run(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) open(i, i - first);
    const Interval hull = hull_of_keys(mask_, first, last);
    for (int64_t key = hull.begin; key < hull.end; key += kKeys) {
      const int64_t keys = least(kKeys, hull.end - key);
      bool packed = false;
      for (int64_t i = first; i < last; ++i) {
        const Interval at = columns(mask_, i, key, keys);
        if (at.empty()) continue;
        if (!packed) {
          transpose_tile(k_, key, keys, n_.dim, row_, kt_);
          widen_tile(v_, key, keys, n_.dim_v, ld_, vt_);
          for (int64_t d = 0; d < n_.dim_v; ++d) row_[d] = 0;  // from here on, of the sum over a few keys
          packed = true;
        }
        score(qb_ + (i - first) * padded(n_.dim), w_, kt_, n_.dim, at.begin, at.end, s_, static_cast<C*>(nullptr));
        blank(mask_, i, key, at, s_);
        attend(i - first, at);
      }
    }
    for (int64_t i = first; i < last; ++i) close(i, i - first);
  }

 private:
  void open(int64_t i, int64_t r) {
    each_vector<C>(n_.dim, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      write(qb_ + r * padded(n_.dim) + d, read(q_.row(i) + d, n) + read(bias_ + d, n), n);
    });
    for (int64_t d = 0; d < ld_; ++d) acc_[r * ld_ + d] = 0;
    max_[r] = -FloatTraits<C>::infinity;
    sum_[r] = 0;
  }

  void attend(int64_t r, Interval at) {
    constexpr int64_t L = kLanes<C>;
    const int64_t from = at.begin / L * L;
    Vec<C> best = splat(max_[r]);
    for (int64_t j = from; j < at.end; j += L) best = max(best, load(s_ + j));
    const C now = reduce_max(best);
    if (now == -FloatTraits<C>::infinity) return;  // the pattern hides the whole tile
    C* const acc = acc_ + r * ld_;
    if (now != max_[r]) {
      const C rescale = max_[r] == -FloatTraits<C>::infinity ? 0 : exp(splat(max_[r] - now))[0];
      for (int64_t d = 0; d < ld_; ++d) acc[d] *= rescale;
      sum_[r] *= rescale;
      max_[r] = now;
    }
    Vec<C> total = {};
    for (int64_t j = from; j < at.end; j += L) {
      const Vec<C> p = exp(load(s_ + j) - now);
      store(s_ + j, p);
      total += p;
    }
    sum_[r] += reduce_add(total);
    for (int64_t first = at.begin; first < at.end; first += kTerms) {
      for (int64_t j = first; j < least(first + kTerms, at.end); ++j) {
        const C p = s_[j];
        if (p == 0) continue;
        for (int64_t d = 0; d < n_.dim_v; ++d) row_[d] += p * vt_[j * ld_ + d];
      }
      add_part(row_, acc, n_.dim_v);
    }
  }

  void close(int64_t i, int64_t r) {
    const bool empty = sum_[r] == 0;
    const C inverse = empty ? 0 : 1 / sum_[r];
    each_vector<C>(n_.dim_v, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      write(out_ + i * n_.heads * n_.dim_v + d, read(acc_ + r * ld_ + d, n) * inverse, n);
    });
    lse_[i] = empty ? -FloatTraits<C>::infinity : max_[r] + log2(splat(sum_[r]))[0] * FloatTraits<C>::ln2;
  }

  const Sizes& n_;
  const Mask& mask_;
  const HeadRows<T> q_, k_, v_;
  const C *w_, *bias_;
  T* out_;
  C* lse_;
  const int64_t ld_;
  C *kt_, *vt_;    // [D, kKeys], [kKeys, ld]
  C *s_, *row_;    // [kKeys], one row of k or v
  C *qb_, *acc_;   // [kQueries, D], [kQueries, ld]
  C *max_, *sum_;  // [kQueries]
};

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
void forward(const AdditiveFwdArgs& args, int num_threads) {
  using C = ComputeOf<T>;
  const Sizes n(args);
  const Mask mask(args.mask, n);
  const int64_t tiles = (n.num_queries + kQueries - 1) / kQueries, tasks = tiles * n.heads;
  const int64_t scratch = padded(ForwardTask<T>::scratch(n));
  AlignedBuffer<C> memory(scratch * usable_threads(tasks, num_threads));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    const int64_t first = task / n.heads * kQueries;
    ForwardTask<T>(args, n, mask, task % n.heads, memory.data() + thread * scratch)
        .run(first, least(first + kQueries, n.num_queries));
  });
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

void forward_any(const AdditiveFwdArgs& args, int num_threads) {
  switch (args.q.dtype) {
    case DType::f32:
      return forward<float>(args, num_threads);
    case DType::bf16:
      return forward<bf16>(args, num_threads);
    case DType::f16:
      return forward<f16>(args, num_threads);
    case DType::f64:
      return forward<double>(args, num_threads);
  }
}

void backward_any(const AdditiveBwdArgs& args, int num_threads) {
  switch (args.q.dtype) {
    case DType::f32:
      return backward<float>(args, num_threads);
    case DType::bf16:
      return backward<bf16>(args, num_threads);
    case DType::f16:
      return backward<f16>(args, num_threads);
    case DType::f64:
      return backward<double>(args, num_threads);
  }
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(AdditiveKernels, additive) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
