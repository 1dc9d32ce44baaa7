// The main kernels of the contrastive losses for compute capability 9.0 (wgmma, TMA), which contrastive_fwd.cu and
// contrastive_bwd.cu launch instead of their own. Features are bf16 or f16 with strides that TMA supports; the small
// kernels and the workspace are the same.
#pragma once

#include "common/cuda/box.h"
#include "contrastive/contrastive_grad.h"
#include "contrastive/contrastive_stats.h"
#include "contrastive/contrastive_tile.h"

namespace mmk::cuda {

// Whether the kernels below support these features on this device: bf16 or f16, E even, strides in multiples of 8.
bool sm90_serves(const Tensor& queries, const Tensor& keys);
inline bool use_sm90(const Tensor& queries, const Tensor& keys) {
  if constexpr (kHaveSm90) {
    return sm90_serves(queries, keys);
  } else {
    return false;
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------
// A block has two consumer warpgroups of 64 x 256 each, one block per multiprocessor; blocks divide the similarities as
// described at `Sweep`, in tiles of 128 x 256. Each warpgroup has its own line of column_parts.

constexpr int kSm90Rows = 64;  // per warpgroup

Sweep sm90_sweep_of(int64_t n, int64_t m);
inline int sm90_column_lines(const Sweep& sweep) { return 2 * sweep.blocks_m; }

struct Sm90Features {
  const Tensor& queries;  // [N, E]
  const Tensor& keys;     // [M, E]
  const float* scale;     // []
  const float* bias;      // [] SigLIP only
};

void launch_infonce_stats_sm90(const Sm90Features& x, const Sweep& sweep, Stats* row_parts, Stats* column_parts,
                               float* diagonal, void* stream);
void launch_siglip_fwd_sm90(const Sm90Features& x, const Sweep& sweep, double* totals, void* stream);

// ---- backward -------------------------------------------------------------------------------------------------------

// A part of G, [rows, columns], as stored by contrastive_bwd.cu: without its leading factor, times 2^14.
struct Superblock {
  int row0, column0, rows, columns;
  void* grad;  // [rows, ld] of the features' dtype
  int ld;      // a multiple of 8
};

constexpr int kSm90Columns = 256;  // of a tile

// row_sums [columns / 256, stride], column_sums [rows / 64 (an even number), stride]: a line per tile, starting at the
// superblock's first row or column.
void launch_infonce_grad_sm90(const Sm90Features& x, const double* lse_q, const double* lse_k, const Superblock& block,
                              LineSums* row_sums, LineSums* column_sums, int stride, void* stream);
// positives [min(N, M)]: G of the positives, without the factor 2^14.
void launch_siglip_grad_sm90(const Sm90Features& x, const Superblock& block, float* positives, void* stream);

// query_sum [N, E] (+)= G Y and key_sum [M, E] (+)= G^T X over the superblock, in float32; sums start at the first
// column and the first row.
void launch_accumulate_sm90(const Sm90Features& x, const Superblock& block, float* query_sum, float* key_sum,
                            void* stream);

}  // namespace mmk::cuda
