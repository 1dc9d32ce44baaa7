// Softmax statistics of rows and columns, shared by the epilogues in softmax_forward.h and softmax_gradient.h.
//
// With a_ij = <x_i, y_j>, logits scale a_ij, and `ref` the similarity of the largest logit of a row,
//   sum = Σ e^(scale (a - ref))     dot = Σ e^(scale (a - ref)) (a - ref)
//   lse = scale ref + log sum       mean of a under the softmax = ref + dot / sum
// The difference is taken before the multiplication by scale: near the largest logit it is exact, nothing overflows
// that float64 could hold, and the mean does not cancel. Sums within a tile are short and in the features' compute
// type; sums over tiles are double. A target (one positive of a row) is excluded and added in double at the end: when
// it has nearly all of the mass, the rest determines the loss.
#pragma once

#include "common/simd/math.h"
#include "contrastive/gradients.h"
#include "contrastive/pairs.h"

namespace mmk {
namespace MMK_ISA {

MMK_INLINE double natural_log(double x) { return log2(splat(x))[0] * FloatTraits<double>::ln2; }
MMK_INLINE double natural_exp(double x) { return exp(splat(x))[0]; }

// An lse as scale * ref + rest, both in the compute type, so that the softmax exponent, scale (a - ref) - rest, loses
// no accuracy near the maximum.
template <class C>
class SplitLse {
 public:
  SplitLse(const double* lse, int64_t count, C scale) : count_(count + kLanes<C>), data_(2 * count_) {
    for (int64_t i = 0; i < count_; ++i) {
      const double value = i < count ? lse[i] : 0;
      double near = scale != 0 ? value / static_cast<double>(scale) : 0;
      if (!(near > -1e30 && near < 1e30)) near = 0;
      const C ref = static_cast<C>(near);
      data_.data()[i] = ref;
      // A row that sees nothing (lse = -inf) has weights 0.
      data_.data()[count_ + i] = value == -FloatTraits<double>::infinity
                                     ? FloatTraits<C>::infinity
                                     : static_cast<C>(value - static_cast<double>(scale) * ref);
    }
  }
  const C* ref() const { return data_.data(); }  // both readable for one vector past the end
  const C* rest() const { return data_.data() + count_; }

 private:
  int64_t count_;
  AlignedBuffer<C> data_;
};

template <class C>
MMK_INLINE Vec<C> softmax(Vec<C> a, C scale, Vec<C> ref, Vec<C> rest) {
  return exp((a - ref) * scale - rest);
}

// The forward's running statistics of rows or columns. Targets are included only in `ref`.
template <class C>
struct Stats {
  C *ref, *sum, *dot;
  C *total, *positive, *best, *of_teacher;  // of_teacher: sum p a with the teacher's p

  static constexpr int kFields = 7;
  Stats at(int64_t i) const { return {ref + i, sum + i, dot + i, total + i, positive + i, best + i, of_teacher + i}; }
};

template <class C>
class StatsBuffer {
 public:
  explicit StatsBuffer(int64_t count) : count_(count), data_(Stats<C>::kFields * count) {}
  Stats<C> stats() const {
    C* p = data_.data();
    const int64_t n = count_;
    return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n, p + 6 * n};
  }
  void clear() const {
    for (int64_t i = 0; i < Stats<C>::kFields * count_; ++i) data_.data()[i] = 0;
    const Stats<C> all = stats();
    for (int64_t i = 0; i < count_; ++i) all.ref[i] = all.best[i] = -FloatTraits<C>::infinity;
  }

 private:
  int64_t count_;
  AlignedBuffer<C> data_;
};

struct TeacherLse {
  const double *rows, *columns;
};

// For low-precision features, whose similarities have larger errors than a rounded exponent, rows and columns may share
// one reference if their own are at most this far apart: what is flushed to zero is below e^-47 of the largest.
constexpr int kSpread = 40;

}  // namespace MMK_ISA
}  // namespace mmk
