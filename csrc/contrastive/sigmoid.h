// The pairwise sigmoid loss and its gradient: epilogues of the tile engine.
//
// With u = -z (scale a + bias), z = +1 for a positive pair, else -1: the loss is softplus(u) and its derivative by the
// logit -z sigmoid(u).
#pragma once

#include "common/simd/math.h"
#include "contrastive/gradients.h"
#include "contrastive/pairs.h"

namespace mmk {
namespace MMK_ISA {

// sigmoid(z) from e = exp(-|z|), without cancellation on either side.
template <class C>
MMK_INLINE Vec<C> sigmoid(Vec<C> z, Vec<C> e) {
  return (z < C{0} ? e : splat(C{1})) / (e + C{1});
}

// -z of the pairs of one vector.
template <bool kPositives, class C, class Row>
MMK_INLINE Vec<C> signs(const Pairs<C>& pairs, const Row& row, int64_t v) {
  if constexpr (kPositives)
    return pairs.positive(row, v) ? splat(C{-1}) : splat(C{1});
  else
    return splat(C{1});
}

template <class C, class Tile>
MMK_INLINE bool may_have_positives(const Pairs<C>& pairs, const Tile& tile) {
  return pairs.rule().by_id() || pairs.meet(tile);
}

// Forward epilogue: row sums of the loss and its derivatives.
template <class Tile>
class SigmoidForward {
  using C = typename Tile::Number;

 public:
  SigmoidForward(int64_t n, C scale, C bias, const Pairs<C>& pairs)
      : n_(n), scale_(scale), bias_(bias), pairs_(pairs), sums_(3 * n) {
    for (int64_t i = 0; i < 3 * n; ++i) sums_.data()[i] = 0;
  }

  void tile(int64_t, const Tile& tile, const C*) const {
    may_have_positives(pairs_, tile) ? add<true>(tile) : add<false>(tile);
  }
  void finish_columns(int64_t, int64_t) const {}

  // The totals of loss, d loss / d scale, d loss / d bias over all rows.
  void finish(double* total) const {
    for (int what = 0; what < 3; ++what) total[what] = 0;
    for (int64_t i = 0; i < n_; ++i)
      for (int what = 0; what < 3; ++what) total[what] += sums_.data()[3 * i + what];
  }

 private:
  template <bool kPositives>
  void add(const Tile& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* s = tile.row(r);
      const auto row = pairs_.row(tile, r);
      Vec<C> loss{}, by_scale{}, by_bias{};
      for_each_vector<C>(tile.cols, [&](int64_t v, auto in) {
        const Vec<C> a = keep(in, load(s + v)), sign = signs<kPositives, C>(pairs_, row, v);
        const Vec<C> z = sign * (a * scale_ + bias_), e = exp(min(z, -z));
        const Vec<C> softplus = max(Vec<C>{}, z) + log2_1p(e) * FloatTraits<C>::ln2;
        const Vec<C> slope = keep(in, sign * sigmoid<C>(z, e));
        loss += keep(in, softplus);
        by_scale += slope * a;
        by_bias += slope;
      });
      double* sum = sums_.data() + 3 * (tile.i0 + r);
      sum[0] += reduce_add(loss);
      sum[1] += reduce_add(by_scale);
      sum[2] += reduce_add(by_bias);
    }
  }

  const int64_t n_;
  const C scale_, bias_;
  const Pairs<C>& pairs_;
  AlignedBuffer<double> sums_;  // [N, 3]
};

// Backward epilogue: the derivative of a pair's loss by its logit.
template <class Tile>
class SigmoidGradient {
  using C = typename Tile::Number;

 public:
  SigmoidGradient(C scale, C bias, const Pairs<C>& pairs) : scale_(scale), bias_(bias), pairs_(pairs) {}

  void operator()(const Tile& tile, const C*) const {
    may_have_positives(pairs_, tile) ? gradient<true>(tile) : gradient<false>(tile);
  }

 private:
  template <bool kPositives>
  void gradient(const Tile& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      C* s = tile.row(r);
      const auto row = pairs_.row(tile, r);
      for_each_vector<C>(tile.cols, [&](int64_t v, auto) {
        const Vec<C> sign = signs<kPositives, C>(pairs_, row, v), z = sign * (load(s + v) * scale_ + bias_);
        store(s + v, sign * sigmoid<C>(z, exp(min(z, -z))));
      });
    }
  }

  const C scale_, bias_;
  const Pairs<C>& pairs_;
};

}  // namespace MMK_ISA
}  // namespace mmk
