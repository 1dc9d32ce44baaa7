// Packing: rows of tokens gathered, scattered and pooled at memory speed. 16-byte accesses where rows allow them,
// element by element otherwise. Every output row has one owner and every sum one order: no atomics, bitwise
// reproducible.
#include "packing/packing.h"

#include <type_traits>

#include "common/check.h"
#include "common/cuda/launch.h"
#include "common/cuda/tile.h"

namespace mmk::cuda {
namespace {

constexpr int kThreads = 256;

// Several short rows to a block, or one long row: `lanes` threads side by side on a row, a power of two.
struct RowGrid {
  int64_t rows;
  int units;  // pieces of a row, each read and written at once
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

// A float32 sum and the rounding errors of its additions (Knuth's two-sum: exact in any order of sizes).
struct CarryingSum {
  float sum, carry;

  __device__ __forceinline__ void add(float x) {
    const float next = sum + x, rounded = next - sum;
    carry += (sum - (next - rounded)) + (x - rounded);
    sum = next;
  }
  // An infinite sum, whose carry is a NaN, stays what it is.
  __device__ __forceinline__ float value() const { return carry == carry ? sum + carry : sum; }
};

template <class Unit>
struct GatherParams {
  RowGrid grid;
  const Unit* __restrict__ source;    // [R, units], rows source_stride apart
  int64_t source_stride;              // in units
  const int64_t* __restrict__ index;  // [T] in [-1, R)
  // output
  Unit* __restrict__ out;  // [T, units]
};

// Rows as RowGrid lays them out; a thread copies units of one row, whatever their dtype.
template <class Unit>
__global__ void __launch_bounds__(kThreads) packing_gather_kernel(const __grid_constant__ GatherParams<Unit> a) {
  const int64_t row = a.grid.row();
  if (row >= a.grid.rows) return;
  const int64_t from = a.index[row];
  const Unit* source = a.source + (from < 0 ? 0 : from * a.source_stride);
  Unit* out = a.out + row * a.grid.units;
#pragma unroll 4
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    out[unit] = from < 0 ? Unit{} : source[unit];
  }
}

template <class T>
struct ScatterParams {
  RowGrid grid;
  const T* __restrict__ packed;        // [T, E], rows packed_stride apart
  int64_t packed_stride;               // in elements
  const int64_t* __restrict__ order;   // [T] positions sorted by the row they go to
  const int64_t* __restrict__ starts;  // [R + 1] into order
  // output
  T* __restrict__ out;  // [R, E]
};

// Rows as RowGrid lays them out; a thread sums its columns of every packed row that goes to its row, in order, in
// float32.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) packing_scatter_kernel(const __grid_constant__ ScatterParams<T> a) {
  const int64_t row = a.grid.row();
  if (row >= a.grid.rows) return;
  const int64_t begin = a.starts[row], end = a.starts[row + 1];
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    CarryingSum sums[kWidth] = {};
    for (int64_t i = begin; i < end; ++i) {
      float x[kWidth];
      load_floats(x, a.packed + a.order[i] * a.packed_stride + unit * kWidth);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[e].add(x[e]);
    }
    float out[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) out[e] = sums[e].value();
    store_floats(a.out + (row * a.grid.units + unit) * kWidth, out);
  }
}

constexpr int kPoolLanes = 32, kPoolGroups = kThreads / kPoolLanes;

template <class T>
struct PoolParams {
  const T* __restrict__ x;  // [T, E], rows x_stride apart
  int64_t x_stride;         // in elements
  int columns;
  const int* __restrict__ cu_seqlens;  // [S + 1]
  PoolMode mode;
  // outputs
  T* __restrict__ out;       // [S, E]
  int* __restrict__ argmax;  // [S, E] for max
};

// Whether (value, row) comes before (best, best_row): larger, a NaN before numbers, the first of equals.
__device__ __forceinline__ bool wins(float value, int row, float best, int best_row) {
  if (row < 0 || best_row < 0) return row >= 0;
  const bool nan = value != value, best_nan = best != best;
  if (nan != best_nan) return nan;
  if (nan || value == best) return row < best_row;
  return value > best;
}

// Rows so far of one column: the sum of their values, or the one that wins.
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

// Grid (segments, parts of a row). 32 threads side by side on a row's columns, 8 groups taking every eighth row of the
// segment; their results meet in shared memory and are combined in the groups' order.
// Shared memory: 8 bytes for each group and column, [8][32 kWidth]: 16 KB at most.
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

// The segment of a row, or -1 past the last.
__device__ __forceinline__ int segment_of(const int* cu_seqlens, int segments, int64_t row) {
  int low = 0, high = segments;  // the first boundary after `row` is in (low, high]
  if (row >= cu_seqlens[segments]) return -1;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Rows as RowGrid lays them out; a thread finds its row's segment by bisection and writes its columns.
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

// Calls run(T{}, integral_constant<int, elements at once>).
template <class Run>
void choose_packing_kernel(const Tensor& in, const Tensor& out, const Run& run) {
  const auto with_width = [&](auto element) {
    using T = decltype(element);
    const bool vectors = in.size[1] % kVector<T> == 0 && rows_aligned(in, sizeof(T)) && rows_aligned(out, sizeof(T));
    if (vectors) return run(element, std::integral_constant<int, kVector<T>>{});
    return run(element, std::integral_constant<int, 1>{});
  };
  switch (in.dtype) {
    case DType::f32:
      return with_width(float{});
    case DType::bf16:
      return with_width(bf16{});
    case DType::f16:
      return with_width(f16{});
    default:
      fail("packing: the CUDA kernels take float32, bfloat16 and float16");
  }
}

template <class Unit>
void launch_gather(const Tensor& source, const Tensor& index, const Tensor& out, int element_bytes, void* stream) {
  const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / element_bytes;
  const RowGrid grid(index.size[0], source.size[1] / per_unit);
  const GatherParams<Unit> params{grid, source.ptr<Unit>(), source.stride[0] / per_unit, index.ptr<int64_t>(),
                                  out.ptr<Unit>()};
  launch("packing_gather", packing_gather_kernel<Unit>, grid.grid(), kThreads, 0, stream, params);
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

void launch_packing_gather_fwd_cuda(const Tensor& source, const Tensor& index, const Tensor& out, void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::choose_packing_kernel(source, out, [&](auto element, auto width) {
    using T = decltype(element);
    if constexpr (decltype(width)::value > 1) {
      cuda::launch_gather<uint4>(source, index, out, sizeof(T), stream);
    } else if constexpr (sizeof(T) == 4) {
      cuda::launch_gather<uint32_t>(source, index, out, sizeof(T), stream);
    } else {
      cuda::launch_gather<uint16_t>(source, index, out, sizeof(T), stream);
    }
  });
}

void launch_packing_scatter_fwd_cuda(const Tensor& packed, const Tensor& order, const Tensor& starts, const Tensor& out,
                                     void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::choose_packing_kernel(packed, out, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    const cuda::RowGrid grid(out.size[0], out.size[1] / kWidth);
    const cuda::ScatterParams<T> params{
        grid, packed.ptr<T>(), packed.stride[0], order.ptr<int64_t>(), starts.ptr<int64_t>(), out.ptr<T>()};
    cuda::launch("packing_scatter", cuda::packing_scatter_kernel<T, kWidth>, grid.grid(), cuda::kThreads, 0, stream,
                 params);
  });
}

void launch_packing_segment_pool_fwd_cuda(const Tensor& x, const Tensor& cu_seqlens, PoolMode mode, const Tensor& out,
                                          const Tensor& argmax, void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::choose_packing_kernel(x, out, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value, kColumns = cuda::kPoolLanes * kWidth;
    const cuda::PoolParams<T> params{
        x.ptr<T>(),   x.stride[0],      static_cast<int>(x.size[1]), cu_seqlens.ptr<int>(), mode,
        out.ptr<T>(), argmax.ptr<int>()};
    const dim3 grid(static_cast<unsigned>(out.size[0]), static_cast<unsigned>((x.size[1] + kColumns - 1) / kColumns));
    constexpr int kBytes = cuda::kPoolGroups * kColumns * 8;
    if (mode == PoolMode::max) {
      cuda::launch("packing_segment_pool_fwd", cuda::packing_segment_pool_fwd_kernel<T, kWidth, cuda::MaxOfRows>, grid,
                   cuda::kThreads, kBytes, stream, params);
    } else {
      cuda::launch("packing_segment_pool_fwd", cuda::packing_segment_pool_fwd_kernel<T, kWidth, cuda::SumOfRows>, grid,
                   cuda::kThreads, kBytes, stream, params);
    }
  });
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

}  // namespace mmk
