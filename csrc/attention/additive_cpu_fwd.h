// Forward of additive attention on the CPU: a task owns kQueries queries of a head and loops over the hull of their
// keys with an online softmax.
#pragma once

#include "attention/additive_cpu_tile.h"

namespace mmk {
namespace MMK_ISA {
namespace additive {

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
          for (int64_t d = 0; d < n_.dim_v; ++d) row_[d] = 0;  // now holds the sum over a few keys
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

}  // namespace additive
}  // namespace MMK_ISA
}  // namespace mmk
