// Packing: gather and scatter of token rows, and patchify, at memory bandwidth. 16-byte accesses if rows are aligned,
// element by element otherwise. Every output row has one owner and every sum a fixed order: no atomics, bitwise
// reproducible.
#include "packing/packing.h"
#include "packing/packing_mrope.h"
#include "packing/packing_tile.h"

namespace mmk::cuda {
namespace {

constexpr int kMaxSources = 4;

template <class Unit>
struct GatherParams {
  RowGrid grid;
  const Unit* __restrict__ sources[kMaxSources];  // [R_k, units], row stride strides[k]; null after the last
  int64_t strides[kMaxSources];                   // in units
  int64_t rows[kMaxSources];                      // R_k
  const int64_t* __restrict__ index;              // [T] into the concatenated sources, or -1
  // output
  Unit* __restrict__ out;  // [T, units]
};

// Rows laid out by RowGrid; a thread copies units of one row, independent of dtype.
template <class Unit>
__global__ void __launch_bounds__(kThreads) packing_gather_kernel(const __grid_constant__ GatherParams<Unit> a) {
  const int64_t row = a.grid.row();
  if (row >= a.grid.rows) return;
  int64_t from = a.index[row];
  const Unit* source = nullptr;
  if (from >= 0) {
#pragma unroll
    for (int k = 0; k < kMaxSources; ++k) {  // unrolled, so that the parameters are not indexed at run time
      if (source == nullptr && from < a.rows[k]) source = a.sources[k] + from * a.strides[k];
      from -= a.rows[k];
    }
  }
  Unit* out = a.out + row * a.grid.units;
#pragma unroll 4
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    out[unit] = source == nullptr ? Unit{} : source[unit];
  }
}

constexpr int kChunk = kScatterChunk;

template <class T>
struct ScatterParams {
  RowGrid grid;                        // rows of `out`, or chunks
  const T* __restrict__ packed;        // [T, E], row stride packed_stride
  int64_t packed_stride;               // in elements
  const int64_t* __restrict__ index;   // [T] target rows, or -1
  const int64_t* __restrict__ order;   // [T] positions sorted by target row
  const int64_t* __restrict__ starts;  // [R + 1] into order
  float* __restrict__ sums;            // [T / kChunk, E]: sums of the chunks of order with one target
  // output
  T* __restrict__ out;  // [R, E]
};

// Chunks laid out by RowGrid; a thread sums its columns of the chunk's packed rows if all have the same target. A
// target with thousands of packed rows then takes a step per chunk, not per packed row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    packing_scatter_chunks_kernel(const __grid_constant__ ScatterParams<T> a) {
  const int64_t chunk = a.grid.row();
  if (chunk >= a.grid.rows) return;
  const int64_t* order = a.order + chunk * kChunk;
  const int64_t target = a.index[order[0]];
  if (target < 0 || a.index[order[kChunk - 1]] != target) return;
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    CarryingSum sums[kWidth] = {};
    for (int i = 0; i < kChunk; ++i) {
      float x[kWidth];
      load_floats(x, a.packed + order[i] * a.packed_stride + unit * kWidth);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[e].add(x[e]);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) a.sums[(chunk * a.grid.units + unit) * kWidth + e] = sums[e].value();
  }
}

// Rows laid out by RowGrid; a thread sums its columns of its row's packed rows, in order, in float32: single rows up to
// the first whole chunk, the sums of whole chunks, single rows after the last.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) packing_scatter_kernel(const __grid_constant__ ScatterParams<T> a) {
  const int64_t row = a.grid.row();
  if (row >= a.grid.rows) return;
  const int64_t begin = a.starts[row], end = a.starts[row + 1];
  const int64_t first_chunk = (begin + kChunk - 1) / kChunk, last_chunk = end / kChunk;
  const bool whole = last_chunk > first_chunk;
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    CarryingSum sums[kWidth] = {};
    const auto add_singles = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        float x[kWidth];
        load_floats(x, a.packed + a.order[i] * a.packed_stride + unit * kWidth);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sums[e].add(x[e]);
      }
    };
    add_singles(begin, whole ? first_chunk * kChunk : end);
    if (whole) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        const float* sum = a.sums + (chunk * a.grid.units + unit) * kWidth;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sums[e].add(sum[e]);
      }
      add_singles(last_chunk * kChunk, end);
    }
    float out[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) out[e] = sums[e].value();
    store_floats(a.out + (row * a.grid.units + unit) * kWidth, out);
  }
}

template <class Unit>
struct PatchifyParams {
  RowGrid grid;                        // tokens and their units
  const Unit* __restrict__ x;          // pixels image after image, or tokens [T, units]
  const int64_t* __restrict__ grids;   // [N, 3]: t, h, w in patches
  const int64_t* __restrict__ starts;  // [N + 1]: the first token of each image
  int images, channels, patch, temporal, merge;
  int line;  // units per patch line
  bool inverse;
  // output
  Unit* __restrict__ out;  // tokens or pixels
};

// Tokens laid out by RowGrid; a thread finds its token's image by binary search and moves units of its lines. Tokens
// are ordered by time, then by blocks of merge x merge patches, then inside the block; a token is [C, temporal, patch,
// patch].
template <class Unit>
__global__ void __launch_bounds__(kThreads) packing_patchify_kernel(const __grid_constant__ PatchifyParams<Unit> a) {
  const int64_t token = a.grid.row();
  if (token >= a.grid.rows) return;
  const int image = segment_of(a.starts, a.images, token);
  if (image < 0) return;
  const int64_t height = a.grids[3 * image + 1], width = a.grids[3 * image + 2];
  const int64_t in_image = token - a.starts[image], in_block = in_image % (a.merge * a.merge);
  const int64_t block = in_image / (a.merge * a.merge), blocks_x = width / a.merge, blocks_y = height / a.merge;
  const int64_t x = block % blocks_x * a.merge + in_block % a.merge;
  const int64_t y = block / blocks_x % blocks_y * a.merge + in_block / a.merge;
  const int64_t frame = block / (blocks_x * blocks_y) * a.temporal;
  const int64_t line = width * a.line, channel = line * height * a.patch;  // strides in units
  const int64_t corner =
      a.starts[image] * a.grid.units + frame * a.channels * channel + y * a.patch * line + x * a.line;
  for (int unit = a.grid.first_unit(); unit < a.grid.units; unit += a.grid.lanes) {
    const int row = unit / a.line, in_line = unit % a.line;  // line index within the token: [C, temporal, patch]
    const int f = row / a.patch % a.temporal, c = row / (a.patch * a.temporal);
    const int64_t pixel =
        corner + (static_cast<int64_t>(f) * a.channels + c) * channel + row % a.patch * line + in_line;
    const int64_t in_token = token * a.grid.units + unit;
    if (a.inverse) {
      a.out[pixel] = a.x[in_token];
    } else {
      a.out[in_token] = a.x[pixel];
    }
  }
}

// A thread owns a token.
__global__ void __launch_bounds__(kThreads)
    packing_mrope_kernel(const __grid_constant__ MropeSpans spans, int64_t tokens, int64_t* __restrict__ out) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < tokens) spans.place(t, out + t, tokens);
}

template <class Unit>
void launch_gather(const Tensor* const (&sources)[kMaxSources], const Tensor& index, const Tensor& out,
                   int element_bytes, void* stream) {
  const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / element_bytes;
  GatherParams<Unit> params{
      RowGrid(index.size[0], out.size[1] / per_unit), {}, {}, {}, index.ptr<int64_t>(), out.ptr<Unit>()};
  for (int k = 0; k < kMaxSources && sources[k]->given(); ++k) {
    params.sources[k] = sources[k]->ptr<Unit>();
    params.strides[k] = sources[k]->stride[0] / per_unit;
    params.rows[k] = sources[k]->size[0];
  }
  launch("packing_gather", packing_gather_kernel<Unit>, params.grid.grid(), kThreads, 0, stream, params);
}

// Calls run(Unit{}) with the largest unit that divides `bytes` and every address.
template <class Run>
void choose_unit(int64_t bytes, uintptr_t addresses, const Run& run) {
  const uintptr_t all = static_cast<uintptr_t>(bytes) | addresses;
  if (all % 16 == 0) return run(uint4{});
  if (all % 4 == 0) return run(uint32_t{});
  run(uint16_t{});
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

void launch_packing_gather_fwd_cuda(const Tensor& first, const Tensor& second, const Tensor& third,
                                    const Tensor& fourth, const Tensor& index, const Tensor& out, void* stream) {
  const cuda::DeviceGuard guard(out);
  const Tensor* const sources[] = {&first, &second, &third, &fourth};
  bool all_aligned = true;
  cuda::choose_packing_kernel(first, out, [&](auto element, auto width) {
    using T = decltype(element);
    for (const Tensor* source : sources)
      all_aligned = all_aligned && (!source->given() || cuda::rows_aligned(*source, sizeof(T)));
    if (decltype(width)::value > 1 && all_aligned) {
      cuda::launch_gather<uint4>(sources, index, out, sizeof(T), stream);
    } else if constexpr (sizeof(T) == 4) {
      cuda::launch_gather<uint32_t>(sources, index, out, sizeof(T), stream);
    } else {
      cuda::launch_gather<uint16_t>(sources, index, out, sizeof(T), stream);
    }
  });
}

void launch_packing_scatter_fwd_cuda(const Tensor& packed, const Tensor& index, const Tensor& order,
                                     const Tensor& starts, const Tensor& sums, const Tensor& out, void* stream) {
  const cuda::DeviceGuard guard(out);
  cuda::choose_packing_kernel(packed, out, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    cuda::ScatterParams<T> params{cuda::RowGrid(sums.size[0], out.size[1] / kWidth),
                                  packed.ptr<T>(),
                                  packed.stride[0],
                                  index.ptr<int64_t>(),
                                  order.ptr<int64_t>(),
                                  starts.ptr<int64_t>(),
                                  sums.ptr<float>(),
                                  out.ptr<T>()};
    cuda::launch("packing_scatter_chunks", cuda::packing_scatter_chunks_kernel<T, kWidth>, params.grid.grid(),
                 cuda::kThreads, 0, stream, params);
    params.grid = cuda::RowGrid(out.size[0], out.size[1] / kWidth);
    cuda::launch("packing_scatter", cuda::packing_scatter_kernel<T, kWidth>, params.grid.grid(), cuda::kThreads, 0,
                 stream, params);
  });
}

void launch_packing_mrope_fwd_cuda(const Tensor& cu_seqlens, const Tensor& starts, const Tensor& extent,
                                   const Tensor& gained, const Tensor& out, void* stream) {
  const cuda::DeviceGuard guard(out);
  const MropeSpans spans{cu_seqlens.ptr<int64_t>(), cu_seqlens.size[0],   starts.ptr<int64_t>(), starts.size[0],
                         extent.ptr<int64_t>(),     gained.ptr<int64_t>()};
  const dim3 grid(static_cast<unsigned>((out.size[1] + cuda::kThreads - 1) / cuda::kThreads));
  cuda::launch("packing_mrope", cuda::packing_mrope_kernel, grid, cuda::kThreads, 0, stream, spans, out.size[1],
               out.ptr<int64_t>());
}

void launch_packing_patchify_fwd_cuda(const Tensor& x, const Tensor& grid, const Tensor& starts, int channels,
                                      int patch, int temporal, int merge, bool inverse, const Tensor& out,
                                      void* stream) {
  const cuda::DeviceGuard guard(out);
  const int64_t bytes = x.dtype == DType::f32 ? 4 : 2, row = int64_t{1} * channels * temporal * patch * patch;
  const auto addresses = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(out.data);
  cuda::choose_unit(patch * bytes, addresses, [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / bytes;
    const cuda::RowGrid rows(x.size[0] / row, row / per_unit);
    const cuda::PatchifyParams<Unit> params{rows,
                                            x.ptr<Unit>(),
                                            grid.ptr<int64_t>(),
                                            starts.ptr<int64_t>(),
                                            static_cast<int>(grid.size[0]),
                                            channels,
                                            patch,
                                            temporal,
                                            merge,
                                            static_cast<int>(patch / per_unit),
                                            inverse,
                                            out.ptr<Unit>()};
    cuda::launch("packing_patchify", cuda::packing_patchify_kernel<Unit>, rows.grid(), cuda::kThreads, 0, stream,
                 params);
  });
}

}  // namespace mmk
