// Shared by the packing CUDA kernels: the grid over rows, 16-byte accesses, compensated sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/cuda/dtype.h"
#include "common/cuda/launch.h"
#include "common/cuda/tile.h"

namespace mmk::cuda {
namespace {

constexpr int kThreads = 256;

// Several short rows per block, or one long row: `lanes` adjacent threads per row, a power of two.
struct RowGrid {
  int64_t rows;
  int units;  // units of access per row
  int lanes;

  RowGrid(int64_t row_count, int64_t unit_count) : rows(row_count), units(static_cast<int>(unit_count)), lanes(1) {
    while (lanes < units && lanes < kThreads) lanes *= 2;
  }
  dim3 grid() const {
    const int64_t per_block = kThreads / lanes;
    return dim3(static_cast<unsigned>(units > 0 ? (rows + per_block - 1) / per_block : 0));
  }
  __device__ __forceinline__ int64_t row() const {
    return static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  }
  __device__ __forceinline__ int first_unit() const { return threadIdx.x % lanes; }
};

// kWidth elements in float32: one 16-byte access, or one element.
template <int kWidth, class T>
__device__ __forceinline__ void load_floats(float (&x)[kWidth], const T* from) {
  alignas(16) T elements[kWidth];
  if constexpr (kWidth > 1) {
    *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(from);
  } else {
    elements[0] = *from;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) x[e] = to_float(elements[e]);
}

template <int kWidth, class T>
__device__ __forceinline__ void store_floats(T* to, const float (&x)[kWidth]) {
  alignas(16) T elements[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) elements[e] = from_float<T>(x[e]);
  if constexpr (kWidth > 1) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(elements);
  } else {
    *to = elements[0];
  }
}

// A compensated float32 sum (Knuth's two-sum: exact whichever operand is larger).
struct CarryingSum {
  float sum, carry;

  __device__ __forceinline__ void add(float x) {
    const float next = sum + x, rounded = next - sum;
    carry += (sum - (next - rounded)) + (x - rounded);
    sum = next;
  }
  // An infinite sum has a NaN carry, which is ignored.
  __device__ __forceinline__ float value() const { return carry == carry ? sum + carry : sum; }
};

// The segment (or image) of a row, or -1 past the last; starts [segments + 1] is non-decreasing.
template <class Int>
__device__ __forceinline__ int segment_of(const Int* starts, int segments, int64_t row) {
  int low = 0, high = segments;  // the first boundary after `row` is in (low, high]
  if (row >= starts[segments]) return -1;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (starts[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Calls run(T{}, integral_constant<int, elements at once>).
template <class Run>
void choose_packing_kernel(const Tensor& in, const Tensor& out, const Run& run) {
  const auto with_width = [&](auto element) {
    using T = decltype(element);
    const bool vectors = in.size[1] % kVector<T> == 0 && rows_aligned(in, sizeof(T)) && rows_aligned(out, sizeof(T));
    if (vectors) return run(element, std::integral_constant<int, kVector<T>>{});
    return run(element, std::integral_constant<int, 1>{});
  };
  with_dtype(in.dtype, "packing", with_width);
}

}  // namespace
}  // namespace mmk::cuda
