// InfoNCE's running statistics of one row or column: (top, sum, first) as in contrastive_fwd.cu. `top` may be any value
// near the largest; lse and gradient do not depend on it.
#pragma once

#include <cfloat>

#include "common/cuda/tile.h"

namespace mmk::cuda {

struct Stats {
  float top, sum, first;
};

// Empty statistics. Not -inf: top - other.top must stay finite where the sums are zero.
__device__ __forceinline__ Stats no_stats() { return {-FLT_MAX, 0.f, 0.f}; }

template <class T>
__device__ __forceinline__ Stats merge(Stats x, Stats y, float k) {
  const float top = fmaxf(x.top, y.top), dx = x.top - top, dy = y.top - top;
  const float ex = exp_of<T>(k * dx), ey = exp_of<T>(k * dy);
  return {top, x.sum * ex + y.sum * ey, ex * (x.first + x.sum * dx) + ey * (y.first + y.sum * dy)};
}

// Marks an element out of bounds, or the positive. (-inf has weight 0 too.)
constexpr float kBeyond = -FLT_MAX;

// Statistics of one row or column: kOthers values in the registers of this thread and of the lanes that differ from it
// in the bits kFirst .. kLast (0: no other lane).
template <class T, int kOthers, int kFirst, int kLast, class Value>
__device__ __forceinline__ Stats line_stats(float k, const Value& value) {
  Stats stats = no_stats();
#pragma unroll
  for (int i = 0; i < kOthers; ++i) stats.top = fmaxf(stats.top, value(i));
  if constexpr (kFirst > 0) stats.top = lanes_reduce<kFirst, kLast>(stats.top, Max{});
#pragma unroll
  for (int i = 0; i < kOthers; ++i) {
    if (value(i) <= kBeyond) continue;  // NaN passes
    const float below = value(i) - stats.top, weight = exp_of<T>(k * below);
    stats.sum += weight;
    stats.first = fmaf(weight, below, stats.first);
  }
  if constexpr (kFirst > 0) {
    stats.sum = lanes_reduce<kFirst, kLast>(stats.sum, Sum{});
    stats.first = lanes_reduce<kFirst, kLast>(stats.first, Sum{});
  }
  return stats;
}

}  // namespace mmk::cuda
