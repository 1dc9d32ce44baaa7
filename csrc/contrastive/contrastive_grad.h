// Shared by the kernels that write G, see contrastive_bwd.cu.
#pragma once

#include "common/cuda/tile.h"

namespace mmk::cuda {

constexpr float kStored = 16384.f;  // scale of G in memory

// InfoNCE: sums over the non-positives in one row or column of a tile, with p, q and e as in contrastive_bwd.cu. They
// add `towards_x` to the positive's weight in its query's gradient and `towards_y` to that in its key's.
struct LineSums {
  float towards_x, towards_y;

  __device__ __forceinline__ LineSums operator+(LineSums o) const {
    return {towards_x + o.towards_x, towards_y + o.towards_y};
  }
};

// A float64 as two float32.
struct alignas(8) Split {
  float high, low;
};

__device__ __forceinline__ Split split(double x) {
  const float high = static_cast<float>(x);
  return {high, static_cast<float>(x - high)};
}

template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace mmk::cuda
