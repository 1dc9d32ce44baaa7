// Segment pooling at memory bandwidth: one row per segment, and its gradient. Every output row has one owner and every
// sum a fixed order: no atomics, bitwise reproducible.
#include "packing/packing.h"
#include "packing/packing_tile.h"

namespace mmk::cuda {
namespace {

constexpr int kPoolLanes = 32, kPoolGroups = kThreads / kPoolLanes;

template <class T>
struct PoolParams {
  const T* __restrict__ x;  // [T, E], rows x_stride apart
  int64_t x_stride;         // in elements
  int columns;
  const int* __restrict__ cu_seqlens;  // [S + 1]
  const float* __restrict__ weights;   // [T], or null for weights of 1
  PoolMode mode;
  // outputs
  T* __restrict__ out;       // [S, E]
  int* __restrict__ argmax;  // [S, E] for max
};

// Whether (value, row) beats (best, best_row): larger value, NaN before numbers, then lower row.
__device__ __forceinline__ bool wins(float value, int row, float best, int best_row) {
  if (row < 0 || best_row < 0) return row >= 0;
  const bool nan = value != value, best_nan = best != best;
  if (nan != best_nan) return nan;
  if (nan || value == best) return row < best_row;
  return value > best;
}

// Running result of one column: the sum, or the winner.
struct SumOfRows {
  CarryingSum total{0.f, 0.f};

  __device__ __forceinline__ void add(float value, int) { total.add(value); }
  __device__ __forceinline__ void add(const SumOfRows& o) { total.add(o.total.sum), total.carry += o.total.carry; }
  __device__ __forceinline__ float value() const { return total.value(); }
};
struct MaxOfRows {
  float best = 0.f;
  int row = -1;

  __device__ __forceinline__ void add(float value, int at) {
    if (wins(value, at, best, row)) best = value, row = at;
  }
  __device__ __forceinline__ void add(const MaxOfRows& o) { add(o.best, o.row); }
  __device__ __forceinline__ float value() const { return best; }
};
static_assert(sizeof(SumOfRows) == 8 && sizeof(MaxOfRows) == 8, "the shared-memory budget");

// Grid (segments, parts of a row). 32 adjacent threads on a row's columns, 8 groups taking every eighth row of the
// segment; results are combined in shared memory in group order.
// Shared memory: 8 bytes per group and column, [8][32 kWidth]: 16 KB at most.
template <class T, int kWidth, class OfRows>
__global__ void __launch_bounds__(kThreads, 4)
    packing_segment_pool_fwd_kernel(const __grid_constant__ PoolParams<T> a) {
  constexpr int kColumns = kPoolLanes * kWidth;
  OfRows* shared = reinterpret_cast<OfRows*>(dynamic_smem());  // [groups, kColumns]
  const int lane = threadIdx.x % kPoolLanes, group = threadIdx.x / kPoolLanes;
  const int column = (blockIdx.y * kPoolLanes + lane) * kWidth;
  const int begin = a.cu_seqlens[blockIdx.x], length = a.cu_seqlens[blockIdx.x + 1] - begin;
  const int end = a.mode == PoolMode::first ? begin + min(length, 1) : begin + length;

  OfRows pooled[kWidth];
  if (column < a.columns) {
    for (int row = begin + group; row < end; row += kPoolGroups) {
      float value[kWidth];
      load_floats(value, a.x + row * a.x_stride + column);
      if (a.weights != nullptr) {
        const float weight = a.weights[row];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) value[e] *= weight;
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) pooled[e].add(value[e], row);
    }
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) shared[group * kColumns + lane * kWidth + e] = pooled[e];
  __syncthreads();
  if (group != 0 || column >= a.columns) return;
  for (int other = 1; other < kPoolGroups; ++other) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) pooled[e].add(shared[other * kColumns + lane * kWidth + e]);
  }
  const int64_t at = static_cast<int64_t>(blockIdx.x) * a.columns + column;
  float out[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    out[e] = pooled[e].value();
    if (a.mode == PoolMode::mean && length > 0) out[e] /= static_cast<float>(length);
    if constexpr (std::is_same_v<OfRows, MaxOfRows>) a.argmax[at + e] = pooled[e].row;
  }
  store_floats(a.out + at, out);
}

template <class T>
struct PoolGradParams {
  RowGrid grid;
  const T* __restrict__ grad_out;      // [S, E], rows grad_stride apart
  int64_t grad_stride;                 // in elements
  const int* __restrict__ cu_seqlens;  // [S + 1]
  const int* __restrict__ argmax;      // [S, E] for max, else null
  int segments;
  PoolMode mode;
  // output
  T* __restrict__ grad_x;  // [T, E]
};

// Rows laid out by RowGrid; a thread finds its row's segment by binary search and writes its columns.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    packing_segment_pool_bwd_kernel(const __grid_constant__ PoolGradParams<T> a) {
  const int64_t row = a.grid.row();
  if (row >= a.grid.rows) return;
  const int segment = segment_of(a.cu_seqlens, a.segments, row);
  const int begin = segment < 0 ? 0 : a.cu_seqlens[segment];
  const float length = segment < 0 ? 1.f : static_cast<float>(a.cu_seqlens[segment + 1] - begin);
  const bool zero = segment < 0 || (a.mode == PoolMode::first && row != begin);
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    float grad[kWidth] = {};
    if (!zero) {
      load_floats(grad, a.grad_out + segment * a.grad_stride + unit * kWidth);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (a.mode == PoolMode::mean) grad[e] /= length;
        if (a.mode == PoolMode::max) {
          const int64_t at = (static_cast<int64_t>(segment) * a.grid.units + unit) * kWidth + e;
          grad[e] = a.argmax[at] == row ? grad[e] : 0.f;
        }
      }
    }
    store_floats(a.grad_x + (row * a.grid.units + unit) * kWidth, grad);
  }
}

template <class T>
struct WeightedGradParams {
  const T* __restrict__ grad_out;      // [S, E], rows grad_stride apart
  int64_t grad_stride;                 // in elements
  const T* __restrict__ x;             // [T, E], rows x_stride apart
  int64_t x_stride;                    // in elements
  const float* __restrict__ weights;   // [T]
  const int* __restrict__ cu_seqlens;  // [S + 1]
  int segments, columns;
  int64_t rows;
  // outputs
  T* __restrict__ grad_x;            // [T, E]
  float* __restrict__ grad_weights;  // [T]
};

// A warp owns a row: its lanes scale the segment's gradient, and their shares of the dot product with the row are added
// in a fixed order.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    packing_weighted_pool_bwd_kernel(const __grid_constant__ WeightedGradParams<T> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int segment = segment_of(a.cu_seqlens, a.segments, row);
  const float weight = a.weights[row];
  CarryingSum dot{0.f, 0.f};
  for (int column = threadIdx.x % kWarp * kWidth; column < a.columns; column += kWarp * kWidth) {
    float grad[kWidth] = {}, x[kWidth];
    if (segment >= 0) {
      load_floats(grad, a.grad_out + segment * a.grad_stride + column);
      load_floats(x, a.x + row * a.x_stride + column);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) dot.add(grad[e] * x[e]), grad[e] *= weight;
    }
    store_floats(a.grad_x + row * a.columns + column, grad);
  }
  const float total = warp_reduce(dot.value(), Sum{});
  if (threadIdx.x % kWarp == 0) a.grad_weights[row] = total;
}

// Launches pooling with or without weights.
void launch_pool(const Tensor& x, const Tensor& cu_seqlens, const Tensor& weights, PoolMode mode, const Tensor& out,
                 const Tensor& argmax, void* stream) {
  choose_packing_kernel(x, out, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value, kColumns = kPoolLanes * kWidth;
    const PoolParams<T> params{
        x.ptr<T>(),   x.stride[0],      static_cast<int>(x.size[1]), cu_seqlens.ptr<int>(), weights.ptr<float>(), mode,
        out.ptr<T>(), argmax.ptr<int>()};
    const dim3 grid(static_cast<unsigned>(out.size[0]), static_cast<unsigned>((x.size[1] + kColumns - 1) / kColumns));
    constexpr int kBytes = kPoolGroups * kColumns * 8;
    if (mode == PoolMode::max) {
      launch("packing_segment_pool_fwd", packing_segment_pool_fwd_kernel<T, kWidth, MaxOfRows>, grid, kThreads, kBytes,
             stream, params);
    } else {
      launch("packing_segment_pool_fwd", packing_segment_pool_fwd_kernel<T, kWidth, SumOfRows>, grid, kThreads, kBytes,
             stream, params);
    }
  });
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

void launch_packing_segment_pool_fwd_cuda(const Tensor& x, const Tensor& cu_seqlens, PoolMode mode, const Tensor& out,
                                          const Tensor& argmax, void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::launch_pool(x, cu_seqlens, Tensor{}, mode, out, argmax, stream);
}

void launch_packing_weighted_pool_fwd_cuda(const Tensor& x, const Tensor& weights, const Tensor& cu_seqlens,
                                           const Tensor& out, void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::launch_pool(x, cu_seqlens, weights, PoolMode::sum, out, Tensor{}, stream);
}

void launch_packing_segment_pool_bwd_cuda(const Tensor& grad_out, const Tensor& cu_seqlens, const Tensor& argmax,
                                          PoolMode mode, const Tensor& grad_x, void* stream) {
  const cuda::DeviceGuard guard(grad_x);
  cuda::choose_packing_kernel(grad_out, grad_x, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    const cuda::RowGrid grid(grad_x.size[0], grad_x.size[1] / kWidth);
    const cuda::PoolGradParams<T> params{grid,
                                         grad_out.ptr<T>(),
                                         grad_out.stride[0],
                                         cu_seqlens.ptr<int>(),
                                         argmax.ptr<int>(),
                                         static_cast<int>(cu_seqlens.size[0]) - 1,
                                         mode,
                                         grad_x.ptr<T>()};
    cuda::launch("packing_segment_pool_bwd", cuda::packing_segment_pool_bwd_kernel<T, kWidth>, grid.grid(),
                 cuda::kThreads, 0, stream, params);
  });
}

void launch_packing_weighted_pool_bwd_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& weights,
                                           const Tensor& cu_seqlens, const Tensor& grad_x, const Tensor& grad_weights,
                                           void* stream) {
  const cuda::DeviceGuard guard(grad_x);
  const auto with_width = [&](auto element, auto width) {
    using T = decltype(element);
    const cuda::WeightedGradParams<T> params{grad_out.ptr<T>(),
                                             grad_out.stride[0],
                                             x.ptr<T>(),
                                             x.stride[0],
                                             weights.ptr<float>(),
                                             cu_seqlens.ptr<int>(),
                                             static_cast<int>(cu_seqlens.size[0]) - 1,
                                             static_cast<int>(x.size[1]),
                                             x.size[0],
                                             grad_x.ptr<T>(),
                                             grad_weights.ptr<float>()};
    constexpr int kRows = cuda::kThreads / cuda::kWarp;
    const dim3 grid(static_cast<unsigned>((x.size[0] + kRows - 1) / kRows));
    cuda::launch("packing_weighted_pool_bwd", cuda::packing_weighted_pool_bwd_kernel<T, decltype(width)::value>, grid,
                 cuda::kThreads, 0, stream, params);
  };
  cuda::choose_packing_kernel(x, grad_x, [&](auto element, auto width) {
    if (cuda::rows_aligned(grad_out, sizeof(element))) return with_width(element, width);
    with_width(element, std::integral_constant<int, 1>{});
  });
}

}  // namespace mmk
