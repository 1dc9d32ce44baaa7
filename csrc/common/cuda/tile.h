// Tiles: global to shared memory, and the warp-level matrix product. Shared by all families.
//
// A tile in shared memory pads each row by 16 bytes. Row lengths are multiples of 64 bytes, so eight neighbouring rows
// start in eight different groups of four banks, and ldmatrix and the float4 reads below are free of bank conflicts.
//
// The accumulator of a warp is acc[MI][NI][4]: MI x NI tiles of mma.m16n8, computed by tensor cores for 16-bit elements
// and by FMA for float (tf32 would lose accuracy). Element ownership is the same, so epilogues are written once for all
// dtypes. With lane = 4 g + t:
//   acc[mi][ni][e] is row mi * 16 + g + 8 * (e / 2), column ni * 8 + 2 t + e % 2
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/atoms.h"
#include "common/cuda/reduce.h"
#include "common/tensor.h"

namespace mmk::cuda {

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

// Row pitch of a shared tile in elements.
template <class T>
constexpr int pitch(int columns) {
  return columns + kVector<T>;
}

template <class T>
constexpr int tile_bytes(int rows, int columns) {
  return rows * pitch<T>(columns) * static_cast<int>(sizeof(T));
}

// A matrix in global memory with contiguous last dimension. `vectors`: every row is 16-byte aligned.
template <class T>
struct Matrix {
  const T* data;       // [rows, columns]
  int64_t row_stride;  // in elements
  int rows, columns;
  bool vectors;
};

// Host: whether a tensor's rows can be read in 16-byte pieces.
inline bool rows_aligned(const Tensor& x, int element_bytes) {
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return false;
  for (int i = 0; i + 1 < x.ndim; ++i) {
    if (x.size[i] > 1 && x.stride[i] * element_bytes % 16 != 0) return false;
  }
  return true;
}

// Copies x[row0 : row0 + kRows, column0 : column0 + kColumns] to `tile`, zeros out of bounds. Called by all kThreads of
// the block; complete after cp_async_commit, cp_async_wait and a barrier.
template <int kRows, int kColumns, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const Matrix<T>& x, int row0, int column0) {
  constexpr int kPerRow = kColumns / kVector<T>;
  static_assert(kColumns % kVector<T> == 0, "whole vectors");
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector<T>;
    const int left = row0 + row < x.rows ? min(max(x.columns - column0 - column, 0), kVector<T>) : 0;
    T* target = tile + row * pitch<T>(kColumns) + column;
    const T* source = x.data + (left > 0 ? (row0 + row) * x.row_stride + column0 + column : 0);
    if (x.vectors) {
      cp_async_16(target, source, left * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) target[e] = e < left ? source[e] : T{};
    }
  }
}

// Layout of an operand in shared memory.
enum class Major {
  k,     // [m or n][k]: the summed dimension is contiguous
  outer  // [k][m or n]
};

namespace detail {

// A fragment of rows m0 .. m0 + 15, summed positions k .. k + 15.
template <Major kMajor, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int ld, int m0, int k) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::k) {
    ldmatrix_x4(a, tile + (m0 + lane % 16) * ld + k + lane / 16 * 8);
  } else {
    ldmatrix_x4_trans(a, tile + (k + lane / 16 * 8 + lane % 8) * ld + m0 + lane / 8 % 2 * 8);
  }
}

// B fragments of columns n0 .. n0 + 15: b[0], b[1] of the first eight and b[2], b[3] of the second.
template <Major kMajor, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int ld, int n0, int k) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::k) {
    ldmatrix_x4(b, tile + (n0 + lane / 16 * 8 + lane % 8) * ld + k + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4_trans(b, tile + (k + lane % 16) * ld + n0 + lane / 16 * 8);
  }
}

// Four summed positions of one row: element e is (k + e, outer).
template <Major kMajor>
__device__ __forceinline__ void load_four(float (&x)[4], const float* tile, int ld, int outer, int k) {
  if constexpr (kMajor == Major::k) {
    const float4 v = *reinterpret_cast<const float4*>(tile + outer * ld + k);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = tile[(k + e) * ld + outer];
  }
}

// Four summed positions of two neighbouring columns.
template <Major kMajor>
__device__ __forceinline__ void load_four_by_two(float (&x)[2][4], const float* tile, int ld, int outer, int k) {
  if constexpr (kMajor == Major::k) {
    load_four<kMajor>(x[0], tile, ld, outer, k);
    load_four<kMajor>(x[1], tile, ld, outer + 1, k);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 v = *reinterpret_cast<const float2*>(tile + (k + e) * ld + outer);
      x[0][e] = v.x, x[1][e] = v.y;
    }
  }
}

}  // namespace detail

// acc += A [16 MI, depth] B [depth, 8 NI] over tiles in shared memory; depth is a multiple of 16, NI is even.
// a and b point at the warp's first row (Major::k) or column (Major::outer); lda, ldb are pitches.
template <Major kMajorA, Major kMajorB, int MI, int NI, class T>
__device__ __forceinline__ void warp_gemm(float (&acc)[MI][NI][4], const T* a, int lda, const T* b, int ldb,
                                          int depth) {
  static_assert(NI % 2 == 0, "B fragments come in pairs");
#pragma unroll 4
  for (int k = 0; k < depth; k += 16) {
    uint32_t fa[MI][4];
#pragma unroll
    for (int mi = 0; mi < MI; ++mi) detail::load_a<kMajorA>(fa[mi], a, lda, mi * 16, k);
#pragma unroll
    for (int ni = 0; ni < NI; ni += 2) {
      uint32_t fb[4];
      detail::load_b<kMajorB>(fb, b, ldb, ni * 8, k);
#pragma unroll
      for (int mi = 0; mi < MI; ++mi) {
        mma_m16n8k16<T>(acc[mi][ni], fa[mi], fb[0], fb[1]);
        mma_m16n8k16<T>(acc[mi][ni + 1], fa[mi], fb[2], fb[3]);
      }
    }
  }
}

// The float path sums 16 products at a time, for up to four column tiles, before adding them to the accumulator,
// because the rounding error of a sum grows with the length of its parts. (Tensor cores have their own rounding.)
template <Major kMajorA, Major kMajorB, int MI, int NI>
__device__ __forceinline__ void warp_gemm(float (&acc)[MI][NI][4], const float* a, int lda, const float* b, int ldb,
                                          int depth) {
  constexpr int kGroup = NI < 4 ? NI : 4;
  static_assert(NI % kGroup == 0, "whole groups");
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int k0 = 0; k0 < depth; k0 += 16) {
#pragma unroll
    for (int n0 = 0; n0 < NI; n0 += kGroup) {
      float part[MI][kGroup][4] = {};
#pragma unroll 1
      for (int k = k0; k < k0 + 16; k += 4) {
        float fa[MI][2][4];
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          detail::load_four<kMajorA>(fa[mi][0], a, lda, mi * 16 + g, k);
          detail::load_four<kMajorA>(fa[mi][1], a, lda, mi * 16 + g + 8, k);
        }
#pragma unroll
        for (int ni = 0; ni < kGroup; ++ni) {
          float fb[2][4];
          detail::load_four_by_two<kMajorB>(fb, b, ldb, (n0 + ni) * 8 + 2 * t, k);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
              part[mi][ni][0] = fmaf(fa[mi][0][e], fb[0][e], part[mi][ni][0]);
              part[mi][ni][1] = fmaf(fa[mi][0][e], fb[1][e], part[mi][ni][1]);
              part[mi][ni][2] = fmaf(fa[mi][1][e], fb[0][e], part[mi][ni][2]);
              part[mi][ni][3] = fmaf(fa[mi][1][e], fb[1][e], part[mi][ni][3]);
            }
          }
        }
      }
#pragma unroll
      for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
        for (int ni = 0; ni < kGroup; ++ni) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[mi][n0 + ni][e] += part[mi][ni][e];
        }
      }
    }
  }
}

// acc [16, 8 NI] += P [16, 8 KI] B [8 KI, 8 NI], where P is another product's accumulator, rounded to T.
// 16-bit: an accumulator already has the layout of an A fragment. float: through this warp's `scratch`, 16 rows of
// pitch(8 KI).
template <Major kMajorB, int KI, int NI, class T>
__device__ __forceinline__ void warp_gemm_from_accumulator(float (&acc)[1][NI][4], const float (&p)[1][KI][4],
                                                           const T* b, int ldb, T* /*scratch*/) {
  static_assert(NI % 2 == 0 && KI % 2 == 0, "fragments come in pairs");
#pragma unroll
  for (int k = 0; k < KI; k += 2) {
    const uint32_t fa[4] = {pack2<T>(p[0][k][0], p[0][k][1]), pack2<T>(p[0][k][2], p[0][k][3]),
                            pack2<T>(p[0][k + 1][0], p[0][k + 1][1]), pack2<T>(p[0][k + 1][2], p[0][k + 1][3])};
#pragma unroll
    for (int ni = 0; ni < NI; ni += 2) {
      uint32_t fb[4];
      detail::load_b<kMajorB>(fb, b, ldb, ni * 8, k * 8);
      mma_m16n8k16<T>(acc[0][ni], fa, fb[0], fb[1]);
      mma_m16n8k16<T>(acc[0][ni + 1], fa, fb[2], fb[3]);
    }
  }
}

template <Major kMajorB, int KI, int NI>
__device__ __forceinline__ void warp_gemm_from_accumulator(float (&acc)[1][NI][4], const float (&p)[1][KI][4],
                                                           const float* b, int ldb, float* scratch) {
  constexpr int kPitch = pitch<float>(8 * KI);
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  __syncwarp();  // wait for the last product's reads
#pragma unroll
  for (int k = 0; k < KI; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scratch[(g + e / 2 * 8) * kPitch + k * 8 + 2 * t + e % 2] = p[0][k][e];
  }
  __syncwarp();
  warp_gemm<Major::k, kMajorB>(acc, scratch, kPitch, b, ldb, 8 * KI);
}

template <int MI, int NI>
__device__ __forceinline__ void clear(float (&acc)[MI][NI][4]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[mi][ni][e] = 0.f;
    }
  }
}

// Row and column, inside its 16 x 8 tile, of accumulator element e of this thread.
__device__ __forceinline__ int fragment_row(int e) { return threadIdx.x % kWarp / 4 + e / 2 * 8; }
__device__ __forceinline__ int fragment_column(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// Writes columns (column, column + 1) of a row of `columns`, with one 2-element store if `pairs`: every row starts at a
// multiple of two elements.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int columns, float x0, float x1, bool pairs) {
  if (pairs && column + 1 < columns) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float2*>(row + column) = make_float2(x0, x1);
    } else {
      *reinterpret_cast<uint32_t*>(row + column) = pack2<T>(x0, x1);
    }
    return;
  }
  if (column < columns) row[column] = from_float<T>(x0);
  if (column + 1 < columns) row[column + 1] = from_float<T>(x1);
}

// exp(x): full float32 accuracy for float; one multiplication and ex2 for 16-bit elements.
template <class T>
__device__ __forceinline__ float exp_of(float x) {
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp2_fast(x * 1.4426950408889634f);
  }
}

}  // namespace mmk::cuda
