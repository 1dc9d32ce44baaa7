// Contrastive backward for sm_90a: computes a superblock of G, see contrastive_bwd.cu, and the two products with it.
#include "contrastive/contrastive_sm90_gemm.h"

namespace mmk::cuda {
namespace sm90 {
namespace {

// A persistent grid visits the tiles of a superblock column by column, so that blocks share reads.
struct Tiles {
  int rows, columns;  // of tiles

  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& visit) const {
#pragma unroll 1
    for (int tile = blockIdx.x; tile < rows * columns; tile += gridDim.x) visit(tile % rows, tile / rows);
  }
};

unsigned grid_of(int tiles) { return static_cast<unsigned>(smaller(tiles, num_multiprocessors())); }

int tiles_along(int64_t n, int tile) { return static_cast<int>((n + tile - 1) / tile); }

template <class T>
struct GradParams {
  TensorMap queries, keys;
  int n, m, e;
  Tiles tiles;
  int row0, column0;                 // the superblock's first row and column
  const float* __restrict__ scale;   // []
  const float* __restrict__ bias;    // [] SigLIP only
  const double* __restrict__ lse_q;  // [N] InfoNCE only
  const double* __restrict__ lse_k;  // [M] InfoNCE only
  // outputs
  T* __restrict__ grad;  // [rows, ld] the superblock's G, zeros at the positives
  int ld;
  int stride;                          // stride of the sums
  LineSums* __restrict__ row_sums;     // [column tiles, stride] InfoNCE only
  LineSums* __restrict__ column_sums;  // [2 row tiles, stride] InfoNCE only
  float* __restrict__ positives;       // [min(N, M)] SigLIP only
};

template <class T>
__device__ __forceinline__ void produce_all(Pipeline& pipeline, const GradParams<T>& a) {
  give_registers<kProducerRegisters>();
  if (threadIdx.x != 0) return;
  a.tiles.visit([&](int row_tile, int tile) {
    produce<Major::k, Major::k>(pipeline, a.queries, a.row0 + row_tile * kRows, a.keys, a.column0 + tile * kColumns,
                                a.e);
  });
}

// A consumer's shared memory.
struct GradShared {
  Split lse_k[kColumns];
  LineSums columns[4][kColumns];
};

// Turns similarities into stored elements of G; sums this warp's part along rows into `row_sums` (from its first row),
// along columns into `columns`. kWhole: no element is out of bounds or positive.
template <bool kWhole, class T>
__device__ __forceinline__ void infonce_grad(Accumulator& s, float scale, const Split (&lse_q)[2], const Split* lse_k,
                                             const Part& part, T* grad, int ld, LineSums* row_sums, LineSums* columns) {
  const int lane = threadIdx.x % kWarp;
  LineSums of_row[2] = {};
  sum_columns(s, [&](int ni) {
    const float4 two = *reinterpret_cast<const float4*>(lse_k + 8 * ni);
    const Split of_key[2] = {{two.x, two.y}, {two.z, two.w}};
    float stored[4] = {}, towards_x[4] = {}, towards_y[4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, c = e % 2;
      if constexpr (!kWhole) {
        if (!part.has(r, ni, c) || part.positive(r, ni, c)) continue;
      }
      const float p = exp_of<T>(fmaf(scale, s[ni][e], -lse_q[r].high) - lse_q[r].low);
      const float q = exp_of<T>(fmaf(scale, s[ni][e], -of_key[c].high) - of_key[c].low);
      stored[e] = rounded<T>(kStored * (p + q));
      const float kept = stored[e] * (1.f / kStored);
      of_row[r] = of_row[r] + LineSums{kept - q, p};
      towards_x[e] = q, towards_y[e] = kept - p;
    }
    s[ni][0] = towards_x[0] + towards_x[2], s[ni][1] = towards_x[1] + towards_x[3];
    s[ni][2] = towards_y[0] + towards_y[2], s[ni][3] = towards_y[1] + towards_y[3];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!kWhole && !part.has_row(r)) continue;
      store_pair(grad + static_cast<int64_t>(8 * r) * ld, 8 * ni, kWhole ? kColumns : part.columns, stored[2 * r],
                 stored[2 * r + 1], true);
    }
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const LineSums sums = {lanes_reduce<1, 2>(of_row[r].towards_x, Sum{}),
                           lanes_reduce<1, 2>(of_row[r].towards_y, Sum{})};
    if (threadIdx.x % 4 == 0 && part.has_row(r)) row_sums[8 * r] = sums;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) columns[place_of(i, c, lane)] = {s[i][c], s[i][2 + c]};
  }
}

// A persistent grid over the superblock's tiles of 128 x 256; three warpgroups, see contrastive_sm90_gemm.h.
// Shared memory: four stages of both operands, 192 KB; lse and sums of the columns, 10 KB for each consumer.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) infonce_grad_sm90_kernel(const __grid_constant__ GradParams<T> a) {
  unsigned char* smem = aligned_smem();
  Pipeline pipeline(smem);
  pipeline.init();
  if (threadIdx.x < kWarpgroup) return produce_all(pipeline, a);

  take_registers<kConsumerRegisters>();
  Consumer consumer;
  GradShared& shared = reinterpret_cast<GradShared*>(smem + Smem<GradShared>::extra)[consumer.index];
  const int thread = threadIdx.x % kWarpgroup;
  const float scale = *a.scale;
  a.tiles.visit([&](int row_tile, int tile) {
    const int own_row = row_tile * kRows + first_row(consumer), own_column = tile * kColumns;  // in the superblock
    const Part part(a.row0 + own_row, a.column0 + own_column, a.n, a.m);
    // Loaded before the product, which hides the latency.
    Split lse_q[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) lse_q[r] = split(part.has_row(r) ? a.lse_q[part.row + 8 * r] : 0.);
#pragma unroll
    for (int i = thread; i < kColumns; i += kWarpgroup) {
      const int column = a.column0 + own_column + i;
      shared.lse_k[i] = split(column < a.m ? a.lse_k[column] : 0.);
    }
    Accumulator s;
    multiply<T, Major::k, Major::k>(s, pipeline, consumer, a.e);
    consumer.sync();
    const int row = own_row + fragment_row(0);
    T* grad = a.grad + static_cast<int64_t>(row) * a.ld + own_column + fragment_column(0);
    LineSums* row_sums = a.row_sums + static_cast<int64_t>(tile) * a.stride + row;
    LineSums* columns = shared.columns[thread / kWarp];
    const Split* lse_k = shared.lse_k + fragment_column(0);
    if (warp_uniform(part.whole)) {
      infonce_grad<true, T>(s, scale, lse_q, lse_k, part, grad, a.ld, row_sums, columns);
    } else {
      infonce_grad<false, T>(s, scale, lse_q, lse_k, part, grad, a.ld, row_sums, columns);
    }
    consumer.sync();
#pragma unroll
    for (int place = thread; place < kColumns; place += kWarpgroup) {
      LineSums sums = shared.columns[0][place];
#pragma unroll
      for (int w = 1; w < 4; ++w) sums = sums + shared.columns[w][place];
      if (a.column0 + own_column + column_at(place) >= a.m) continue;
      a.column_sums[static_cast<int64_t>(2 * row_tile + consumer.index) * a.stride + own_column + column_at(place)] =
          sums;
    }
    consumer.sync();
  });
  consumer.finish();
}

struct Nothing {};

// Grid, warpgroups and ring as infonce_grad_sm90_kernel. Shared memory: four stages of both operands, 192 KB.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) siglip_grad_sm90_kernel(const __grid_constant__ GradParams<T> a) {
  Pipeline pipeline(aligned_smem());
  pipeline.init();
  if (threadIdx.x < kWarpgroup) return produce_all(pipeline, a);

  take_registers<kConsumerRegisters>();
  Consumer consumer;
  const float scale = *a.scale, bias = *a.bias;
  a.tiles.visit([&](int row_tile, int tile) {
    const int own_row = row_tile * kRows + first_row(consumer), own_column = tile * kColumns;
    const Part part(a.row0 + own_row, a.column0 + own_column, a.n, a.m);
    Accumulator s;
    multiply<T, Major::k, Major::k>(s, pipeline, consumer, a.e);
    T* grad = a.grad + static_cast<int64_t>(own_row + fragment_row(0)) * a.ld + own_column + fragment_column(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!part.has_row(r)) continue;
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
        float stored[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float logit = fmaf(scale, s[ni][2 * r + c], bias);
          stored[c] = __fdividef(kStored, 1.f + exp_of<T>(-logit));
          if (!part.positive(r, ni, c)) continue;
          stored[c] = 0.f;
          if (part.has(r, ni, c)) a.positives[part.row + 8 * r] = -1.f / (1.f + expf(logit));
        }
        store_pair(grad + static_cast<int64_t>(8 * r) * a.ld, 8 * ni, part.columns, stored[0], stored[1], true);
      }
    }
  });
  consumer.finish();
}

// One of the two products with a superblock: sum [rows, E] (+)= A features, where A is G or its transpose.
struct Product {
  TensorMap grad;      // boxes of [64 k, 128 rows] of G, or of [64 rows, 64 k] of its transpose
  TensorMap features;  // boxes of [64 of E, 64 k]
  Tiles tiles;
  int rows, depth;  // rows of the sum; summed dimension
  bool first;       // overwrite the sum instead of adding to it
  // output
  float* __restrict__ sum;  // [rows, E]
};

struct AccumulateParams {
  Product to_queries;  // G Y
  Product to_keys;     // G^T X
  int e;
};

// Calls visit(integral_constant<Major of A>, product, row tile, column tile) for the queries' tiles, then the keys'.
template <class Visit>
__device__ __forceinline__ void for_products(const AccumulateParams& a, const Visit& visit) {
  const int queries = a.to_queries.tiles.rows * a.to_queries.tiles.columns;
  const int keys = a.to_keys.tiles.rows * a.to_keys.tiles.columns;
  int tile = blockIdx.x;
#pragma unroll 1
  for (; tile < queries; tile += gridDim.x) {
    const int rows = a.to_queries.tiles.rows;
    visit(std::integral_constant<Major, Major::k>{}, a.to_queries, tile % rows, tile / rows);
  }
#pragma unroll 1
  for (tile -= queries; tile < keys; tile += gridDim.x) {
    const int rows = a.to_keys.tiles.rows;
    visit(std::integral_constant<Major, Major::outer>{}, a.to_keys, tile % rows, tile / rows);
  }
}

// A persistent grid over tiles of 128 x 256 of both sums; three warpgroups, see contrastive_sm90_gemm.h.
// Shared memory: four stages of both operands, 192 KB.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_accumulate_sm90_kernel(const __grid_constant__ AccumulateParams a) {
  Pipeline pipeline(aligned_smem());
  pipeline.init();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    for_products(a, [&](auto major, const Product& product, int row_tile, int tile) {
      produce<decltype(major)::value, Major::outer>(pipeline, product.grad, row_tile * kRows, product.features,
                                                    tile * kColumns, product.depth);
    });
    return;
  }

  take_registers<kConsumerRegisters>();
  Consumer consumer;
  for_products(a, [&](auto major, const Product& product, int row_tile, int tile) {
    Accumulator acc;
    multiply<T, decltype(major)::value, Major::outer>(acc, pipeline, consumer, product.depth);
    const int row0 = row_tile * kRows + first_row(consumer) + fragment_row(0);
    const int column0 = tile * kColumns + fragment_column(0), columns = a.e - column0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row0 + 8 * r >= product.rows) continue;
      float* target = product.sum + static_cast<int64_t>(row0 + 8 * r) * a.e + column0;
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
        if (8 * ni >= columns) continue;  // E is even: see sm90_serves
        float2* two = reinterpret_cast<float2*>(target + 8 * ni);
        const float2 before = product.first ? make_float2(0.f, 0.f) : *two;
        *two = make_float2(before.x + acc[ni][2 * r], before.y + acc[ni][2 * r + 1]);
      }
    }
  });
  consumer.finish();
}

template <class T>
GradParams<T> grad_params(const Sm90Features& x, const Superblock& block) {
  const int n = static_cast<int>(x.queries.size[0]), m = static_cast<int>(x.keys.size[0]);
  return {rows_map(x.queries, kRows),
          rows_map(x.keys, kColumns),
          n,
          m,
          static_cast<int>(x.queries.size[1]),
          {tiles_along(block.rows, kRows), tiles_along(block.columns, kColumns)},
          block.row0,
          block.column0,
          x.scale,
          x.bias,
          nullptr,
          nullptr,
          static_cast<T*>(block.grad),
          block.ld,
          0,
          nullptr,
          nullptr,
          nullptr};
}

// Rows first .. first + count of features, as the summed dimension. Rows past the superblock must read as zero, because
// 0 times inf is NaN.
TensorMap part_map(const Tensor& x, int first, int count) {
  const auto* data = x.ptr<uint16_t>() + first * x.stride[0];
  return rows_map(x.dtype, data, count, x.size[1], x.stride[0], kSwizzleDepth);
}

template <class Run>
void with_dtype(const Tensor& x, const Run& run) {
  if (x.dtype == DType::bf16) {
    run(bf16{});
  } else {
    run(f16{});
  }
}

}  // namespace
}  // namespace sm90

void launch_infonce_grad_sm90(const Sm90Features& x, const double* lse_q, const double* lse_k, const Superblock& block,
                              LineSums* row_sums, LineSums* column_sums, int stride, void* stream) {
  sm90::with_dtype(x.queries, [&](auto element) {
    using T = decltype(element);
    sm90::GradParams<T> params = sm90::grad_params<T>(x, block);
    params.lse_q = lse_q;
    params.lse_k = lse_k;
    params.row_sums = row_sums;
    params.column_sums = column_sums;
    params.stride = stride;
    launch("infonce_grad_sm90", sm90::infonce_grad_sm90_kernel<T>,
           dim3(sm90::grid_of(params.tiles.rows * params.tiles.columns)), sm90::kThreads,
           sm90::Smem<sm90::GradShared>::bytes, stream, params);
  });
}

void launch_siglip_grad_sm90(const Sm90Features& x, const Superblock& block, float* positives, void* stream) {
  sm90::with_dtype(x.queries, [&](auto element) {
    using T = decltype(element);
    sm90::GradParams<T> params = sm90::grad_params<T>(x, block);
    params.positives = positives;
    launch("siglip_grad_sm90", sm90::siglip_grad_sm90_kernel<T>,
           dim3(sm90::grid_of(params.tiles.rows * params.tiles.columns)), sm90::kThreads,
           sm90::Smem<sm90::Nothing>::bytes, stream, params);
  });
}

void launch_accumulate_sm90(const Sm90Features& x, const Superblock& block, float* query_sum, float* key_sum,
                            void* stream) {
  const int e = static_cast<int>(x.queries.size[1]), columns = sm90::tiles_along(e, sm90::kColumns);
  const auto grad_map = [&](int box_rows) {
    return sm90::rows_map(x.queries.dtype, block.grad, block.rows, block.columns, block.ld, box_rows);
  };
  const sm90::AccumulateParams params{{grad_map(sm90::kRows),
                                       sm90::part_map(x.keys, block.column0, block.columns),
                                       {sm90::tiles_along(block.rows, sm90::kRows), columns},
                                       block.rows,
                                       block.columns,
                                       block.column0 == 0,
                                       query_sum + static_cast<int64_t>(block.row0) * e},
                                      {grad_map(kSwizzleDepth),
                                       sm90::part_map(x.queries, block.row0, block.rows),
                                       {sm90::tiles_along(block.columns, sm90::kRows), columns},
                                       block.columns,
                                       block.rows,
                                       block.row0 == 0,
                                       key_sum + static_cast<int64_t>(block.column0) * e},
                                      e};
  const int tiles = params.to_queries.tiles.rows * columns + params.to_keys.tiles.rows * columns;
  sm90::with_dtype(x.queries, [&](auto element) {
    launch("contrastive_accumulate_sm90", sm90::contrastive_accumulate_sm90_kernel<decltype(element)>,
           dim3(sm90::grid_of(tiles)), sm90::kThreads, sm90::Smem<sm90::Nothing>::bytes, stream, params);
  });
}

}  // namespace mmk::cuda
