// Contrastive forward: one pass over 128 x 128 tiles of a = X Yᵀ, both directions at once, no atomics.
//
// InfoNCE keeps for each row and each column, over all but the positive, (top, sum, first): with b = a for scale >= 0,
// else -a, and k = |scale|,
//   top = max b    sum = Σ exp(k (b - top))    first = Σ exp(k (b - top)) (b - top)
// The positive b_ii is kept separately, so that even a tiny loss loses no accuracy. With x = k (top - b_ii) + ln sum,
// the log odds of the others, a row's (or column's) part of
//   loss is softplus(x)   and of   d loss / d scale   sign σ(x) (top + first / sum - b_ii)
// both times 1/2N; the latter holds at scale 0 too.
#include "contrastive/contrastive_sm90.h"
#include "contrastive/contrastive_stats.h"
#include "contrastive/contrastive_tile.h"

namespace mmk::cuda {
namespace {

template <class T>
struct InfoNceParams {
  Matrix<T> queries;                // [N, E]
  Matrix<T> keys;                   // [M, E]
  const float* __restrict__ scale;  // []
  Sweep sweep;
  // outputs
  Stats* __restrict__ row_parts;     // [blocks_n, N]
  Stats* __restrict__ column_parts;  // [blocks_m, M]
  float* __restrict__ diagonal;      // [N] b_ii
};

// Where the warps of a tile exchange statistics; reuses the memory of the operand tiles between products.
struct TileStats {
  Stats rows[kWarpsN][kTile];
  Stats columns[kWarpsM][kTile];
};
static_assert(sizeof(TileStats) <= kGemmBytes<float> && sizeof(TileStats) <= kGemmBytes<bf16>, "shares their memory");

template <class T>
__device__ __forceinline__ void write_tile_stats(TileStats& shared, const Accumulator& b, float k) {
#pragma unroll
  for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Stats stats = line_stats<T, 2 * kNI, 1, 2>(k, [&](int i) { return b[mi][i / 2][2 * r + i % 2]; });
      if (threadIdx.x % 4 == 0) shared.rows[warp_n()][tile_row(mi, 2 * r)] = stats;
    }
  }
#pragma unroll
  for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Stats stats = line_stats<T, 2 * kMI, 4, 16>(k, [&](int i) { return b[i / 2][ni][i % 2 * 2 + c]; });
      if (threadIdx.x % kWarp < 4) shared.columns[warp_m()][tile_column(ni, c)] = stats;
    }
  }
}

// Grid (blocks_m, blocks_n), see Sweep. A warp reduces its 64 x 32 part of a tile along rows and columns with shuffles.
// Then threads 0 .. 127 each merge one row into registers kept for the row tile, and threads 128 .. 255 each merge one
// column into the block's own line of column_parts. Shared memory: two stages of both operands, 73 KB (16-bit) or 72 KB
// (float); the statistics (9 KB) share it.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    infonce_stats_kernel(const __grid_constant__ InfoNceParams<T> a) {
  TileStats& shared = *reinterpret_cast<TileStats*>(dynamic_smem());
  const float scale = *a.scale, k = fabsf(scale), sign = scale < 0.f ? -1.f : 1.f;
  const int n = a.queries.rows, m = a.keys.rows;
  const bool owns_row = threadIdx.x < kTile;
  const int line = threadIdx.x % kTile;
  for (int row_tile = blockIdx.x; row_tile < a.sweep.row_tiles; row_tile += a.sweep.blocks_m) {
    const int row0 = row_tile * kTile;
    const int rows = min(n - row0, kTile);
    Stats row_stats = no_stats();
    for (int tile = a.sweep.first_column_tile(); tile < a.sweep.last_column_tile(); ++tile) {
      const int column0 = tile * kTile;
      const int columns = min(m - column0, kTile);
      Accumulator b;
      block_gemm<Major::k, Major::k>(b, a.queries, row0, a.keys, column0, a.queries.columns);
#pragma unroll
      for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
        for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = tile_row(mi, e), column = tile_column(ni, e);
            const bool exists = row < rows && column < columns, positive = row_tile == tile && row == column;
            if (exists && positive) a.diagonal[row0 + row] = sign * b[mi][ni][e];
            b[mi][ni][e] = exists && !positive ? sign * b[mi][ni][e] : kBeyond;
          }
        }
      }
      write_tile_stats<T>(shared, b, k);
      __syncthreads();
      if (owns_row) {
#pragma unroll
        for (int w = 0; w < kWarpsN; ++w) row_stats = merge<T>(row_stats, shared.rows[w][line], k);
      } else if (line < columns) {
        Stats* part = a.column_parts + static_cast<int64_t>(blockIdx.x) * m + column0 + line;
        Stats stats = row_tile == static_cast<int>(blockIdx.x) ? no_stats() : *part;
#pragma unroll
        for (int w = 0; w < kWarpsM; ++w) stats = merge<T>(stats, shared.columns[w][line], k);
        *part = stats;
      }
      __syncthreads();
    }
    if (owns_row && line < rows) a.row_parts[static_cast<int64_t>(blockIdx.y) * n + row0 + line] = row_stats;
  }
}

constexpr int kFinishThreads = 256;

struct InfoNceFinishParams {
  int64_t n;
  int column_lines, row_lines;
  const float* __restrict__ scale;         // []
  const Stats* __restrict__ row_parts;     // [row_lines, N]
  const Stats* __restrict__ column_parts;  // [column_lines, N]
  const float* __restrict__ diagonal;      // [N]
  // outputs
  double* __restrict__ lse_q;   // [N]
  double* __restrict__ lse_k;   // [N]
  double* __restrict__ totals;  // [2, blocks] sums of the block's rows: loss, gradient of the scale
};

__device__ __forceinline__ Stats merge_parts(const Stats* parts, int count, int64_t stride, float k) {
  Stats stats = no_stats();
  for (int i = 0; i < count; ++i) stats = merge<float>(stats, parts[i * stride], k);
  return stats;
}

struct LineLoss {
  double lse;
  float loss, grad;
};

// The loss of one row or column from its positive and the statistics of the others.
__device__ __forceinline__ LineLoss line_loss(Stats others, float positive, float k) {
  const double k64 = k;
  if (others.sum == 0.f) return {k64 * positive, 0.f, 0.f};
  const float log_sum = logf(others.sum), x = fmaf(k, others.top - positive, log_sum);
  const float small = expf(-fabsf(x)), more = log1pf(small), odds = (x >= 0.f ? 1.f : small) / (1.f + small);
  const double lse = x >= 0.f ? k64 * others.top + (log_sum + more) : k64 * positive + more;  // exact products
  return {lse, fmaxf(x, 0.f) + more, odds * (others.first / others.sum + (others.top - positive))};
}

// A thread per pair: merges the partial statistics of row i and of column i. Shared memory: 8 doubles.
__global__ void __launch_bounds__(kFinishThreads) infonce_finish_kernel(const __grid_constant__ InfoNceFinishParams a) {
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const float scale = *a.scale, k = fabsf(scale);
  double loss = 0, grad = 0;
  if (i < a.n) {
    const LineLoss row = line_loss(merge_parts(a.row_parts + i, a.row_lines, a.n, k), a.diagonal[i], k);
    const LineLoss column = line_loss(merge_parts(a.column_parts + i, a.column_lines, a.n, k), a.diagonal[i], k);
    a.lse_q[i] = row.lse;
    a.lse_k[i] = column.lse;
    loss = static_cast<double>(row.loss) + column.loss;
    grad = static_cast<double>(row.grad) + column.grad;
    if (scale < 0.f) grad = -grad;
  }
  loss = block_sum<kFinishThreads>(loss, scratch);
  __syncthreads();
  grad = block_sum<kFinishThreads>(grad, scratch);
  if (threadIdx.x == 0) {
    a.totals[blockIdx.x] = loss;
    a.totals[gridDim.x + blockIdx.x] = grad;
  }
}

struct TotalParams {
  const double* __restrict__ totals;  // [outputs, count]
  int64_t count;
  double weight;
  // outputs; null if there are fewer
  float* __restrict__ out[3];  // [] each
};

// A block per output sums its line of `totals`. Shared memory: 8 doubles.
__global__ void __launch_bounds__(kFinishThreads) contrastive_total_kernel(const __grid_constant__ TotalParams a) {
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += kFinishThreads) sum += a.totals[blockIdx.x * a.count + i];
  sum = block_sum<kFinishThreads>(sum, scratch);
  if (threadIdx.x == 0) *a.out[blockIdx.x] = static_cast<float>(sum * a.weight);
}

template <class T>
struct SiglipParams {
  Matrix<T> queries;                // [N, E]
  Matrix<T> keys;                   // [M, E]
  const float* __restrict__ scale;  // []
  const float* __restrict__ bias;   // []
  Sweep sweep;
  // output
  double* __restrict__ totals;  // [3, blocks_m * blocks_n] sums of loss, gradient of scale, gradient of bias
};

// With x = -z (scale a + bias): loss Σ softplus(x), gradients Σ -z σ(x) a and Σ -z σ(x).
// Grid (blocks_m, blocks_n), see Sweep. A thread sums a tile's 64 elements in float32, positives (of the other sign)
// separately, and the tiles in float64. Shared memory: as infonce_stats_kernel.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    siglip_fwd_kernel(const __grid_constant__ SiglipParams<T> a) {
  const float scale = *a.scale, bias = *a.bias;
  const int n = a.queries.rows, m = a.keys.rows;
  double total[3] = {0, 0, 0};
  for (int row_tile = blockIdx.x; row_tile < a.sweep.row_tiles; row_tile += a.sweep.blocks_m) {
    for (int tile = a.sweep.first_column_tile(); tile < a.sweep.last_column_tile(); ++tile) {
      const int row0 = row_tile * kTile, column0 = tile * kTile;
      Accumulator s;
      block_gemm<Major::k, Major::k>(s, a.queries, row0, a.keys, column0, a.queries.columns);
      const int rows = min(n - row0, kTile);
      const int columns = min(m - column0, kTile);
#pragma unroll
      for (int mi = 0; mi < kMI; ++mi) {
        float part[3] = {0.f, 0.f, 0.f};
#pragma unroll
        for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = tile_row(mi, e), column = tile_column(ni, e);
            if (row >= rows || column >= columns) continue;
            const bool positive = row_tile == tile && row == column;
            const float logit = fmaf(scale, s[mi][ni][e], bias), x = positive ? -logit : logit;
            const float small = expf(-fabsf(x)), sigmoid = (x >= 0.f ? 1.f : small) / (1.f + small);
            const float loss = fmaxf(x, 0.f) + log1pf(small);
            if (positive) {
              total[0] += loss;
              total[1] -= static_cast<double>(sigmoid) * s[mi][ni][e];
              total[2] -= sigmoid;
            } else {
              part[0] += loss;
              part[1] = fmaf(sigmoid, s[mi][ni][e], part[1]);
              part[2] += sigmoid;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) total[i] += part[i];
      }
    }
  }
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  const int block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double sum = block_sum<kThreads>(total[i], scratch);
    if (threadIdx.x == 0) a.totals[static_cast<int64_t>(i) * blocks + block] = sum;
    __syncthreads();
  }
}

constexpr int kScratchBytes = kFinishThreads / kWarp * sizeof(double);

struct InfoNceWorkspace {
  Stats* row_parts;
  Stats* column_parts;
  float* diagonal;
  double* totals;

  InfoNceWorkspace(Workspace& workspace, int64_t n, int64_t m)
      : row_parts(workspace.take<Stats>(max_blocks_n(n, m) * n)),
        column_parts(workspace.take<Stats>(smaller(2 * tiles_of(n), kMaxBlocksM) * m)),  // sm_90a: two per block
        diagonal(workspace.take<float>(n)),
        totals(workspace.take<double>(2 * (n / kFinishThreads + 1))) {}
};

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

int64_t contrastive_infonce_fwd_workspace_cuda(int64_t n, int64_t m, int64_t e) {
  (void)e;
  cuda::Workspace workspace;
  cuda::InfoNceWorkspace(workspace, n, m);
  return workspace.used();
}

void launch_contrastive_infonce_fwd_cuda(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                                         const Tensor& loss, const Tensor& lse_q, const Tensor& lse_k,
                                         const Tensor& grad_scale, const Tensor& workspace, void* stream) {
  const int64_t n = queries.size[0], m = keys.size[0];
  MMK_CHECK(n == m, "infonce: expected as many keys as queries, got ", m, " and ", n);
  const cuda::DeviceGuard guard(logit_scale);
  cuda::Sweep sweep = cuda::sweep_of(n, m);
  int column_lines = sweep.blocks_m;
  cuda::Workspace pieces(workspace);
  const cuda::InfoNceWorkspace work(pieces, n, m);
  const unsigned blocks = static_cast<unsigned>((n + cuda::kFinishThreads - 1) / cuda::kFinishThreads);
  if (cuda::use_sm90(queries, keys)) {
    if constexpr (cuda::kHaveSm90) {
      sweep = cuda::sm90_sweep_of(n, m);
      column_lines = cuda::sm90_column_lines(sweep);
      cuda::launch_infonce_stats_sm90({queries, keys, logit_scale.ptr<float>(), nullptr}, sweep, work.row_parts,
                                      work.column_parts, work.diagonal, stream);
    }
  } else if (n > 0) {
    cuda::with_dtype(queries.dtype, "contrastive", [&](auto element) {
      using T = decltype(element);
      const cuda::InfoNceParams<T> params{cuda::matrix_of<T>(queries),
                                          cuda::matrix_of<T>(keys),
                                          logit_scale.ptr<float>(),
                                          sweep,
                                          work.row_parts,
                                          work.column_parts,
                                          work.diagonal};
      cuda::launch("infonce_stats", cuda::infonce_stats_kernel<T>, dim3(sweep.blocks_m, sweep.blocks_n), cuda::kThreads,
                   cuda::kGemmBytes<T>, stream, params);
    });
  }
  const cuda::InfoNceFinishParams finish{n,
                                         column_lines,
                                         sweep.blocks_n,
                                         logit_scale.ptr<float>(),
                                         work.row_parts,
                                         work.column_parts,
                                         work.diagonal,
                                         lse_q.ptr<double>(),
                                         lse_k.ptr<double>(),
                                         work.totals};
  cuda::launch("infonce_finish", cuda::infonce_finish_kernel, dim3(blocks), cuda::kFinishThreads, cuda::kScratchBytes,
               stream, finish);
  const cuda::TotalParams total{work.totals,
                                blocks,
                                n > 0 ? 0.5 / static_cast<double>(n) : 0.,
                                {loss.ptr<float>(), grad_scale.ptr<float>(), nullptr}};
  cuda::launch("infonce_total", cuda::contrastive_total_kernel, dim3(2), cuda::kFinishThreads, cuda::kScratchBytes,
               stream, total);
}

int64_t contrastive_siglip_fwd_workspace_cuda(int64_t n, int64_t m, int64_t e) {
  (void)e;
  cuda::Workspace workspace;
  workspace.take<double>(3 * cuda::max_blocks_m(n) * cuda::max_blocks_n(n, m));
  return workspace.used();
}

void launch_contrastive_siglip_fwd_cuda(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                                        const Tensor& logit_bias, const Tensor& loss, const Tensor& grad_scale,
                                        const Tensor& grad_bias, const Tensor& workspace, void* stream) {
  const int64_t n = queries.size[0], m = keys.size[0];
  const cuda::DeviceGuard guard(logit_scale);
  const bool sm90 = cuda::use_sm90(queries, keys);
  cuda::Sweep sweep = cuda::sweep_of(n, m);
  if constexpr (cuda::kHaveSm90) {
    if (sm90) sweep = cuda::sm90_sweep_of(n, m);
  }
  const int64_t blocks = n > 0 && m > 0 ? sweep.blocks_m * sweep.blocks_n : 0;
  cuda::Workspace pieces(workspace);
  double* totals = pieces.take<double>(3 * blocks);
  if (sm90) {
    if constexpr (cuda::kHaveSm90) {
      cuda::launch_siglip_fwd_sm90({queries, keys, logit_scale.ptr<float>(), logit_bias.ptr<float>()}, sweep, totals,
                                   stream);
    }
  } else if (blocks > 0) {
    cuda::with_dtype(queries.dtype, "contrastive", [&](auto element) {
      using T = decltype(element);
      const cuda::SiglipParams<T> params{cuda::matrix_of<T>(queries),
                                         cuda::matrix_of<T>(keys),
                                         logit_scale.ptr<float>(),
                                         logit_bias.ptr<float>(),
                                         sweep,
                                         totals};
      cuda::launch("siglip_fwd", cuda::siglip_fwd_kernel<T>, dim3(sweep.blocks_m, sweep.blocks_n), cuda::kThreads,
                   cuda::kGemmBytes<T>, stream, params);
    });
  }
  const cuda::TotalParams total{totals,
                                blocks,
                                n > 0 ? 1. / static_cast<double>(n) : 0.,
                                {loss.ptr<float>(), grad_scale.ptr<float>(), grad_bias.ptr<float>()}};
  cuda::launch("siglip_total", cuda::contrastive_total_kernel, dim3(3), cuda::kFinishThreads, cuda::kScratchBytes,
               stream, total);
}

}  // namespace mmk
