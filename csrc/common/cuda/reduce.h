// Reductions in a fixed order, for reproducibility.
#pragma once

#include <cuda_runtime.h>

namespace mmk::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // ignores NaN, as fmaxf does; NaN comes back through the sums of exponentials
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
};
struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};

// All-reduce over lanes that differ only in the bits kFirst .. kLast (powers of two). <1, 2> is the quad that shares a
// row of an accumulator, <4, 16> the eight lanes that share a column.
template <int kFirst, int kLast, class T, class Op>
__device__ __forceinline__ T lanes_reduce(T value, Op op) {
#pragma unroll
  for (int step = kFirst; step <= kLast; step *= 2) value = op(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  return lanes_reduce<1, kWarp / 2>(value, op);
}

// Sum over a block of kThreads, returned to thread 0. scratch: kThreads / 32 elements of shared memory, unused
// before the call and, after it, until the caller's next barrier.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, Sum{});
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += scratch[warp];
  }
  return value;
}

}  // namespace mmk::cuda
