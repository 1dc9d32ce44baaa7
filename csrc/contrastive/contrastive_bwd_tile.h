// A tile of the contrastive backward: similarities again, and from them its part of G (contrastive_bwd.cu).
#pragma once

#include "contrastive/contrastive_grad.h"
#include "contrastive/contrastive_tile.h"

namespace mmk::cuda {

template <class T>
constexpr int kSuperblock = sizeof(T) == 4 ? 2048 : 4096;

enum class Loss { infonce, siglip };

constexpr int kMaxTiles = kSuperblock<bf16> / kTile;  // along one side of a superblock

template <class T>
struct GradTileParams {
  Matrix<T> queries;                 // [N, E]
  Matrix<T> keys;                    // [M, E]
  const float* __restrict__ scale;   // []
  const float* __restrict__ bias;    // [] SigLIP only
  const double* __restrict__ lse_q;  // [N] InfoNCE only
  const double* __restrict__ lse_k;  // [M] InfoNCE only
  int row0, column0;                 // the superblock's first row and column
  // outputs
  T* __restrict__ grad;  // [kSuperblock, ld] the superblock's G, zeros at the positives
  int ld;
  LineSums* __restrict__ row_sums;     // [column tiles, kSuperblock] InfoNCE only: one line per tile of the row
  LineSums* __restrict__ column_sums;  // [row tiles, kSuperblock] InfoNCE only
  float* __restrict__ positives;       // [min(N, M)] SigLIP only: G of the positives, not times 2^14
};

// What the threads of a tile share; takes the place of the operand tiles.
struct TileSums {
  Split lse_q[kTile], lse_k[kTile];
  LineSums rows[kWarpsN][kTile];
  LineSums columns[kWarpsM][kTile];
};
static_assert(sizeof(TileSums) <= kGemmBytes<float> && sizeof(TileSums) <= kGemmBytes<bf16>, "shares their memory");

// A row of this block's part of the superblock.
template <class T>
__device__ __forceinline__ T* grad_row(const GradTileParams<T>& a, int row) {
  return a.grad + static_cast<int64_t>(blockIdx.y * kTile + row) * a.ld + blockIdx.x * kTile;
}

// Turns similarities into the stored elements and sums up its 64 x 32 part of the tile along rows and columns.
template <class T>
__device__ __forceinline__ void infonce_grad(Accumulator& s, const GradTileParams<T>& a, int row0, int column0,
                                             int rows, int columns) {
  TileSums& shared = *reinterpret_cast<TileSums*>(dynamic_smem());
  const float scale = *a.scale;
  const int line = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    shared.lse_q[line] = split(line < rows ? a.lse_q[row0 + line] : 0.);
  } else {
    shared.lse_k[line] = split(line < columns ? a.lse_k[column0 + line] : 0.);
  }
  __syncthreads();
  LineSums of_column[kNI][2] = {};
#pragma unroll
  for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row(mi, 2 * r);
      const Split lse_q = shared.lse_q[row];
      LineSums of_row{0.f, 0.f};
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
        float stored[2] = {0.f, 0.f};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = tile_column(ni, c);
          if (row >= rows || column >= columns || row0 + row == column0 + column) continue;
          const Split lse_k = shared.lse_k[column];
          const float similarity = s[mi][ni][2 * r + c];
          const float p = exp_of<T>(fmaf(scale, similarity, -lse_q.high) - lse_q.low);
          const float q = exp_of<T>(fmaf(scale, similarity, -lse_k.high) - lse_k.low);
          stored[c] = rounded<T>(kStored * (p + q));
          const float kept = stored[c] * (1.f / kStored);
          of_row = of_row + LineSums{kept - q, p};
          of_column[ni][c] = of_column[ni][c] + LineSums{q, kept - p};
        }
        if (row < rows) store_pair(grad_row<T>(a, row), tile_column(ni, 0), columns, stored[0], stored[1], true);
      }
      of_row.towards_x = lanes_reduce<1, 2>(of_row.towards_x, Sum{});
      of_row.towards_y = lanes_reduce<1, 2>(of_row.towards_y, Sum{});
      if (threadIdx.x % 4 == 0) shared.rows[warp_n()][row] = of_row;
    }
  }
#pragma unroll
  for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      of_column[ni][c].towards_x = lanes_reduce<4, 16>(of_column[ni][c].towards_x, Sum{});
      of_column[ni][c].towards_y = lanes_reduce<4, 16>(of_column[ni][c].towards_y, Sum{});
      if (threadIdx.x % kWarp < 4) shared.columns[warp_m()][tile_column(ni, c)] = of_column[ni][c];
    }
  }
}

// The sums of a tile's warps, added in the order of the warps. Threads 0 .. 127 take a row each, the others a column.
template <class T>
__device__ __forceinline__ void write_sums(const GradTileParams<T>& a) {
  const TileSums& shared = *reinterpret_cast<const TileSums*>(dynamic_smem());
  const int line = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    LineSums sums = shared.rows[0][line];
#pragma unroll
    for (int w = 1; w < kWarpsN; ++w) sums = sums + shared.rows[w][line];
    a.row_sums[blockIdx.x * kSuperblock<T> + blockIdx.y * kTile + line] = sums;
  } else {
    LineSums sums = shared.columns[0][line];
#pragma unroll
    for (int w = 1; w < kWarpsM; ++w) sums = sums + shared.columns[w][line];
    a.column_sums[blockIdx.y * kSuperblock<T> + blockIdx.x * kTile + line] = sums;
  }
}

template <class T>
__device__ __forceinline__ void siglip_grad(const Accumulator& s, const GradTileParams<T>& a, int row0, int column0,
                                            int rows, int columns) {
  const float scale = *a.scale, bias = *a.bias;
#pragma unroll
  for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row(mi, 2 * r);
      if (row >= rows) continue;
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
        float stored[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = tile_column(ni, c);
          const float logit = fmaf(scale, s[mi][ni][2 * r + c], bias);
          stored[c] = kStored / (1.f + exp_of<T>(-logit));
          if (row0 + row != column0 + column) continue;
          stored[c] = 0.f;
          if (column < columns) a.positives[row0 + row] = -1.f / (1.f + expf(logit));
        }
        store_pair(grad_row<T>(a, row), tile_column(ni, 0), columns, stored[0], stored[1], true);
      }
    }
  }
}

}  // namespace mmk::cuda
