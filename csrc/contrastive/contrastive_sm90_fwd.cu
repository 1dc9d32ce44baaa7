// Contrastive forward for sm_90a: the statistics of contrastive_fwd.cu, computed from the accumulators tile by tile.
//
// If possible, one exponential per element is used for both its row and its column, relative to the largest similarity
// of a warp's 16 x 256 part of a tile. This requires that no element is so far below the largest that its exponential
// could be denormal; every row or column sum then keeps float32's relative accuracy. Otherwise, and if elements are out
// of bounds or positive, rows and columns use separate exponentials.
#include "contrastive/contrastive_sm90_gemm.h"

namespace mmk::cuda {

bool sm90_serves(const Tensor& queries, const Tensor& keys) {
  if (queries.dtype != DType::bf16 && queries.dtype != DType::f16) return false;
  if (queries.size[0] == 0 || keys.size[0] == 0 || queries.size[1] == 0) return false;
  // (E is even so that rows of the float32 sums start at multiples of 8 bytes.)
  return queries.size[1] % 2 == 0 && tma_serves(queries) && tma_serves(keys) && compute_capability() == 90;
}

Sweep sm90_sweep_of(int64_t n, int64_t m) {
  const int64_t row_tiles = (n + sm90::kRows - 1) / sm90::kRows,
                column_tiles = (m + sm90::kColumns - 1) / sm90::kColumns;
  Sweep sweep{static_cast<int>(row_tiles), static_cast<int>(column_tiles), 1, 1};
  const int64_t blocks = num_multiprocessors(), most = kMaxBlocksM / 2;  // two lines of column_parts per block
  sweep.blocks_m = static_cast<int>(larger(1, smaller(smaller(row_tiles, most), blocks / kColumnShares)));
  sweep.blocks_n =
      static_cast<int>(larger(1, smaller(smaller(column_tiles, max_blocks_n(n, m)), blocks / sweep.blocks_m)));
  return sweep;
}

namespace sm90 {
namespace {

// Calls visit(row tile, column tile) in the order that producer and consumers share.
template <class Visit>
__device__ __forceinline__ void for_tiles(const Sweep& sweep, const Visit& visit) {
  const int first = sweep.first_column_tile(), last = sweep.last_column_tile();
#pragma unroll 1
  for (int row_tile = blockIdx.x; row_tile < sweep.row_tiles; row_tile += sweep.blocks_m) {
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) visit(row_tile, tile);
  }
}

struct ForwardMaps {
  TensorMap queries, keys;
  int n, m, e;
};

// The producer of a forward kernel.
__device__ __forceinline__ void produce_all(Pipeline& pipeline, const ForwardMaps& x, const Sweep& sweep) {
  give_registers<kProducerRegisters>();
  if (threadIdx.x != 0) return;
  for_tiles(sweep, [&](int row_tile, int tile) {
    produce<Major::k, Major::k>(pipeline, x.queries, row_tile * kRows, x.keys, tile * kColumns, x.e);
  });
}

struct StatsParams {
  ForwardMaps x;
  const float* __restrict__ scale;  // []
  Sweep sweep;
  // outputs
  Stats* __restrict__ row_parts;     // [blocks_n, N]
  Stats* __restrict__ column_parts;  // [2 blocks_m, M]
  float* __restrict__ diagonal;      // [N] b_ii
};

// A consumer's shared memory. Row statistics are here because no registers are left.
struct StatsShared {
  Stats columns[4][kColumns];  // over each warp's 16 rows
  Stats rows[2][kWarpgroup];   // each thread's share of its two rows
};

// The maximum range of a warp's logits in log2; 2^-126 is the smallest normal number.
constexpr float kFastRange = 100.f;

// Sums exp(k (value - top)), and that times (value - top). k2 = k / ln 2 is positive, so that kBeyond has weight 0.
struct Weights {
  float k2, top, sum = 0.f, first = 0.f;

  __device__ __forceinline__ Weights(float k2, float top) : k2(k2), top(top) {}
  __device__ __forceinline__ void add(float value) {
    const float below = value - top, weight = exp2_fast(k2 * below);
    sum += weight;
    first = fmaf(weight, below, first);
  }
  // False if there are no elements. (The top of NaNs is kBeyond, too.)
  __device__ __forceinline__ bool any() const { return top > kBeyond || sum != sum; }
};

// Statistics of a warp's 16 x 256 similarities b, all relative to `top`, into rows[0], rows[128] and `columns`.
template <class T>
__device__ __forceinline__ void shared_stats(Accumulator& b, float k, float k2, float top, Stats* rows,
                                             Stats* __restrict__ columns) {
  Stats of_row[2] = {{top, 0.f, 0.f}, {top, 0.f, 0.f}};
  sum_columns(b, [&](int ni) {
    float first[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float below = b[ni][e] - top;
      b[ni][e] = exp2_fast(k2 * below);
      first[e] = b[ni][e] * below;
      of_row[e / 2].sum += b[ni][e];
      of_row[e / 2].first += first[e];
    }
    b[ni][0] += b[ni][2], b[ni][1] += b[ni][3];
    b[ni][2] = first[0] + first[2], b[ni][3] = first[1] + first[3];
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) rows[r * kWarpgroup] = merge<T>(rows[r * kWarpgroup], of_row[r], k);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) columns[place_of(i, c, threadIdx.x % kWarp)] = {top, b[i][c], b[i][2 + c]};
  }
}

// The same with each row and column relative to its own largest.
template <class T>
__device__ __forceinline__ void separate_stats(const Accumulator& b, float k, float k2, Stats* rows,
                                               Stats* __restrict__ columns) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = kBeyond;
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) top = fmaxf(top, fmaxf(b[ni][2 * r], b[ni][2 * r + 1]));
    Weights weights(k2, top);
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) weights.add(b[ni][2 * r]), weights.add(b[ni][2 * r + 1]);
    Stats& row = rows[r * kWarpgroup];
    if (weights.any()) row = merge<T>(row, {top, weights.sum, weights.first}, k);
  }
#pragma unroll
  for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float top = lanes_reduce<4, 16>(fmaxf(b[ni][c], b[ni][2 + c]), Max{});
      Weights weights(k2, top);
      weights.add(b[ni][c]), weights.add(b[ni][2 + c]);
      weights.sum = lanes_reduce<4, 16>(weights.sum, Sum{});
      weights.first = lanes_reduce<4, 16>(weights.first, Sum{});
      if (owns(ni)) {
        columns[place_of(ni % kOwn, c, threadIdx.x % kWarp)] =
            weights.any() ? Stats{top, weights.sum, weights.first} : no_stats();
      }
    }
  }
}

// Statistics of a warp's 16 x 256 similarities, into rows[0], rows[128] and `columns`.
template <class T>
__device__ __forceinline__ void tile_stats(Accumulator& b, bool whole, float k, Stats* rows,
                                           Stats* __restrict__ columns) {
  float top = b[0][0], bottom = b[0][0];
#pragma unroll
  for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
    for (int e = 0; e < 4; ++e) top = fmaxf(top, b[ni][e]), bottom = fminf(bottom, b[ni][e]);
  }
  top = warp_reduce(top, Max{});
  bottom = -warp_reduce(-bottom, Max{});
  // For k = 0 use a small k2: all weights are 1 except kBeyond's.
  const float k2 = fmaxf(k * 1.4426950408889634f, 1e-30f);
  // (NaN is ignored by fmaxf and comes back through the sums either way; inf fails the comparison.)
  if (warp_uniform(whole && k2 * (top - bottom) < kFastRange)) {
    shared_stats<T>(b, k, k2, top, rows, columns);
  } else {
    separate_stats<T>(b, k, k2, rows, columns);
  }
}

// Grid (blocks_m, blocks_n), see Sweep; three warpgroups, see contrastive_sm90_gemm.h. A thread keeps its share of its
// two rows' statistics for the whole row tile. Column statistics are combined in shared memory, and the consumer merges
// them into its own line of column_parts.
// Shared memory: four stages of both operands, 192 KB; the statistics, 15 KB for each consumer.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) infonce_stats_sm90_kernel(const __grid_constant__ StatsParams a) {
  unsigned char* smem = aligned_smem();
  Pipeline pipeline(smem);
  pipeline.init();
  if (threadIdx.x < kWarpgroup) return produce_all(pipeline, a.x, a.sweep);

  take_registers<kConsumerRegisters>();
  Consumer consumer;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, n = a.x.n, m = a.x.m;
  StatsShared& shared = reinterpret_cast<StatsShared*>(smem + Smem<StatsShared>::extra)[consumer.index];
  const float scale = *a.scale, k = fabsf(scale);
  Stats* rows = &shared.rows[0][thread];
  for_tiles(a.sweep, [&](int row_tile, int tile) {
    if (tile == a.sweep.first_column_tile()) rows[0] = rows[kWarpgroup] = no_stats();
    Accumulator b;
    multiply<T, Major::k, Major::k>(b, pipeline, consumer, a.x.e);
    const int row0 = row_tile * kRows + first_row(consumer), column0 = tile * kColumns;
    const Part part(row0, column0, n, m);
    if (scale < 0.f) {
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) b[ni][e] = -b[ni][e];
      }
    }
    if (!part.whole) {
      float of_positive[2] = {0.f, 0.f};
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool positive = part.positive(e / 2, ni, e % 2);
          if (positive) of_positive[e / 2] = b[ni][e];
          if (positive || !part.has(e / 2, ni, e % 2)) b[ni][e] = kBeyond;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (part.has_positive(r)) a.diagonal[part.row + 8 * r] = of_positive[r];
      }
    }
    tile_stats<T>(b, part.whole, k, rows, shared.columns[warp]);
    consumer.sync();
    Stats* line = a.column_parts + static_cast<int64_t>(2 * blockIdx.x + consumer.index) * m;
#pragma unroll
    for (int place = thread; place < kColumns; place += kWarpgroup) {
      const int column = column0 + column_at(place);
      if (column >= m) continue;
      Stats stats = row_tile == static_cast<int>(blockIdx.x) ? no_stats() : line[column];
#pragma unroll
      for (int w = 0; w < 4; ++w) stats = merge<T>(stats, shared.columns[w][place], k);
      line[column] = stats;
    }
    consumer.sync();
    if (tile + 1 < a.sweep.last_column_tile()) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Stats stats = rows[r * kWarpgroup];
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) {
        const Stats other = {__shfl_xor_sync(kFullWarp, stats.top, step), __shfl_xor_sync(kFullWarp, stats.sum, step),
                             __shfl_xor_sync(kFullWarp, stats.first, step)};
        stats = merge<T>(stats, other, k);
      }
      if (threadIdx.x % 4 == 0 && part.has_row(r)) {
        a.row_parts[static_cast<int64_t>(blockIdx.y) * n + part.row + 8 * r] = stats;
      }
    }
  });
  consumer.finish();
}

struct SigmoidParams {
  ForwardMaps x;
  const float* __restrict__ scale;  // []
  const float* __restrict__ bias;   // []
  Sweep sweep;
  // output
  double* __restrict__ totals;  // [3, blocks] sums of loss, gradient of scale, gradient of bias
};

// log(1 + s) for 0 <= s <= 1 with relative error 5e-7: s times a polynomial.
__device__ __forceinline__ float log1p_of(float s) {
  float p = 0.00523268804f;
  p = fmaf(p, s, -0.0295052137f);
  p = fmaf(p, s, 0.0782259107f);
  p = fmaf(p, s, -0.136632428f);
  p = fmaf(p, s, 0.191060051f);
  p = fmaf(p, s, -0.24842982f);
  p = fmaf(p, s, 0.333190978f);
  p = fmaf(p, s, -0.499994934f);
  p = fmaf(p, s, 0.99999994f);
  return p * s;
}

struct SigmoidSums {
  double of[4][3];
};

// Grid, warpgroups and ring as infonce_stats_sm90_kernel. With x = -z (scale a + bias): loss Σ softplus(x), gradients
// Σ -z σ(x) a and Σ -z σ(x). A thread sums a tile's elements in float32, row by row, positives (of the other sign)
// separately, and the tiles in float64.
// Shared memory: four stages of both operands, 192 KB; 96 bytes for each consumer.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) siglip_fwd_sm90_kernel(const __grid_constant__ SigmoidParams a) {
  unsigned char* smem = aligned_smem();
  Pipeline pipeline(smem);
  pipeline.init();
  if (threadIdx.x < kWarpgroup) return produce_all(pipeline, a.x, a.sweep);

  take_registers<kConsumerRegisters>();
  Consumer consumer;
  SigmoidSums* shared = reinterpret_cast<SigmoidSums*>(smem + Smem<SigmoidSums>::extra);
  const int n = a.x.n, m = a.x.m;
  const float scale = *a.scale, bias = *a.bias;
  double total[3] = {0, 0, 0};
  for_tiles(a.sweep, [&](int row_tile, int tile) {
    Accumulator s;
    multiply<T, Major::k, Major::k>(s, pipeline, consumer, a.x.e);
    const Part part(row_tile * kRows + first_row(consumer), tile * kColumns, n, m);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum[3] = {0.f, 0.f, 0.f};
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float similarity = s[ni][2 * r + c], logit = fmaf(scale, similarity, bias);
          if (!part.has(r, ni, c)) continue;
          const bool positive = part.positive(r, ni, c);
          const float x = positive ? -logit : logit, small = exp_of<T>(-fabsf(x));
          const float sigmoid = __fdividef(x >= 0.f ? 1.f : small, 1.f + small), loss = fmaxf(x, 0.f) + log1p_of(small);
          if (positive) {
            total[0] += loss;
            total[1] -= static_cast<double>(sigmoid) * similarity;
            total[2] -= sigmoid;
          } else {
            sum[0] += loss;
            sum[1] = fmaf(sigmoid, similarity, sum[1]);
            sum[2] += sigmoid;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) total[i] += sum[i];
    }
  });
  consumer.finish();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double sum = warp_reduce(total[i], Sum{});
    if (threadIdx.x % kWarp == 0) shared[consumer.index].of[threadIdx.x % kWarpgroup / kWarp][i] = sum;
  }
  named_sync(kJoinBarrier, 2 * kWarpgroup);
  const int i = threadIdx.x - kWarpgroup, block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
  if (i >= 3) return;
  double sum = 0;
  for (int warp = 0; warp < 8; ++warp) sum += shared[warp / 4].of[warp % 4][i];
  a.totals[static_cast<int64_t>(i) * blocks + block] = sum;
}

ForwardMaps maps_of(const Sm90Features& x) {
  return {rows_map(x.queries, kRows), rows_map(x.keys, kColumns), static_cast<int>(x.queries.size[0]),
          static_cast<int>(x.keys.size[0]), static_cast<int>(x.queries.size[1])};
}

dim3 grid_of(const Sweep& sweep) { return dim3(sweep.blocks_m, sweep.blocks_n); }

}  // namespace
}  // namespace sm90

void launch_infonce_stats_sm90(const Sm90Features& x, const Sweep& sweep, Stats* row_parts, Stats* column_parts,
                               float* diagonal, void* stream) {
  const sm90::StatsParams params{sm90::maps_of(x), x.scale, sweep, row_parts, column_parts, diagonal};
  const auto kernel =
      x.queries.dtype == DType::bf16 ? sm90::infonce_stats_sm90_kernel<bf16> : sm90::infonce_stats_sm90_kernel<f16>;
  launch("infonce_stats_sm90", kernel, sm90::grid_of(sweep), sm90::kThreads, sm90::Smem<sm90::StatsShared>::bytes,
         stream, params);
}

void launch_siglip_fwd_sm90(const Sm90Features& x, const Sweep& sweep, double* totals, void* stream) {
  const sm90::SigmoidParams params{sm90::maps_of(x), x.scale, x.bias, sweep, totals};
  const auto kernel =
      x.queries.dtype == DType::bf16 ? sm90::siglip_fwd_sm90_kernel<bf16> : sm90::siglip_fwd_sm90_kernel<f16>;
  launch("siglip_fwd_sm90", kernel, sm90::grid_of(sweep), sm90::kThreads, sm90::Smem<sm90::SigmoidSums>::bytes, stream,
         params);
}

}  // namespace mmk::cuda
