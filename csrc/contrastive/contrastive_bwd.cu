// Contrastive backward: G = d loss / d a is never stored whole. For each superblock of up to kSuperblock x kSuperblock
// pairs one kernel recomputes the similarities and writes its part of G in the features' dtype, small enough to stay in
// the L2 cache; two products then add G Y to the queries' gradient and Gᵀ X to the keys', in float32. Two kernels write
// the gradients. Superblocks run in a fixed order and each sum has one owner: no atomics, bitwise reproducible.
//
//   InfoNCE  G = scale/2N (p_ij + q_ij - 2 [i = j])    p_ij = exp(s_ij - lse_q[i])  q_ij = exp(s_ij - lse_k[j])
//   SigLIP   G = scale/N (-z_ij) σ(-z_ij (s_ij + bias))                              s_ij = scale a_ij
// Elements of the superblock are stored without the leading factor and times 2^14, which is exact and keeps fp16 away
// from its denormals (elements are at most 2 in size).
//
// The positives are excluded and added at the end, in float32. InfoNCE's, p_ii - 1 + q_ii - 1, would be a difference of
// almost equal numbers; instead it is computed as -(Σ p_ij + Σ q_ji) over the other j, with their relative accuracy.
// Where the others lose `e` to rounding in the dtype of G, the positive compensates:
//   dx_i = Σ_j (p_ij + e_ij)(y_j - y_i) + Σ_j (q_ij y_j - q_ji y_i)
// so that features close to each other, whose gradients cancel, keep their digits. lse is float64 and split in two
// parts: subtracting the first from the logit leaves a small and nearly exact difference, from which the second is
// subtracted.
#include "contrastive/contrastive_bwd_tile.h"
#include "contrastive/contrastive_sm90.h"
#include "contrastive/contrastive_tile.h"

namespace mmk::cuda {
namespace {

// Grid (column tiles, row tiles) of the superblock; a block computes 128 x 128 similarities and writes their G.
// Shared memory: two stages of both operands, 73 KB (16-bit) or 72 KB (float); the sums (6 KB) share it.
template <Loss kLoss, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    contrastive_grad_tile_kernel(const __grid_constant__ GradTileParams<T> a) {
  const int row0 = a.row0 + blockIdx.y * kTile, column0 = a.column0 + blockIdx.x * kTile;
  const int rows = a.queries.rows - row0, columns = a.keys.rows - column0;
  Accumulator s;
  block_gemm<Major::k, Major::k>(s, a.queries, row0, a.keys, column0, a.queries.columns);
  if constexpr (kLoss == Loss::infonce) {
    infonce_grad(s, a, row0, column0, rows, columns);
    __syncthreads();
    write_sums(a);
  } else {
    siglip_grad(s, a, row0, column0, rows, columns);
  }
}

struct AddLinesParams {
  const LineSums* __restrict__ sums;  // [tiles, stride]
  int tiles, stride, lines;
  // outputs: weights of the positives so far, from the superblock's first line
  double* __restrict__ towards_x;  // [lines]
  double* __restrict__ towards_y;  // [lines]
};

constexpr int kLineThreads = 128;

// A thread per line.
__global__ void __launch_bounds__(kLineThreads) contrastive_add_lines_kernel(const __grid_constant__ AddLinesParams a) {
  const int line = blockIdx.x * kLineThreads + threadIdx.x;
  if (line >= a.lines) return;
  double x = 0, y = 0;
  for (int tile = 0; tile < a.tiles; ++tile) {
    const LineSums sums = a.sums[tile * a.stride + line];
    x += sums.towards_x;
    y += sums.towards_y;
  }
  a.towards_x[line] += x;
  a.towards_y[line] += y;
}

template <class T>
struct AccumulateParams {
  Matrix<T> grad;      // [rows, columns] of the superblock
  Matrix<T> features;  // [summed, E] the superblock's keys (for the queries' gradient) or queries
  int rows;            // of the result
  bool first;          // overwrite the sum instead of adding to it
  // output
  float* __restrict__ sum;  // [rows, E]
};

// sum (+)= G features (kMajor k) or Gᵀ features (kMajor outer). Grid (tiles of E, row tiles); a block owns 128 x 128 of
// the sum. Shared memory: two stages of both operands, 73 KB (16-bit) or 72 KB (float).
template <Major kMajor, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    contrastive_accumulate_kernel(const __grid_constant__ AccumulateParams<T> a) {
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile, columns = a.features.columns;
  Accumulator acc;
  block_gemm<kMajor, Major::outer>(acc, a.grad, row0, a.features, column0, a.features.rows);
#pragma unroll
  for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + tile_row(mi, e), column = column0 + tile_column(ni, e);
        if (row >= a.rows || column >= columns) continue;
        float* target = a.sum + static_cast<int64_t>(row) * columns + column;
        *target = a.first ? acc[mi][ni][e] : *target + acc[mi][ni][e];
      }
    }
  }
}

constexpr int kWriteThreads = 128;

template <class T>
struct WriteParams {
  const float* __restrict__ sum;        // [rows, E]
  const double* __restrict__ others;    // [pairs] InfoNCE: the others' weight, or null
  const float* __restrict__ positives;  // [pairs] SigLIP: the positives' G, or null
  Matrix<T> partners;                   // [*, E] the features that positives multiply
  int pairs;                            // rows with a positive
  const float* __restrict__ grad_loss;  // []
  const float* __restrict__ scale;      // []
  double weight;                        // 1/2N or 1/N
  // output
  T* __restrict__ out;  // [rows, E]
  int64_t out_stride;
};

// A block per row: out = grad_loss scale weight (sum / 2^14 + positive partner). Without partners nothing was summed.
template <class T>
__global__ void __launch_bounds__(kWriteThreads) contrastive_write_kernel(const __grid_constant__ WriteParams<T> a) {
  const int64_t row = blockIdx.x;
  const int columns = a.partners.columns;
  const float factor = static_cast<float>(static_cast<double>(*a.grad_loss) * *a.scale * a.weight);
  const bool paired = row < a.pairs;
  const float positive = !paired ? 0.f : a.others != nullptr ? static_cast<float>(-a.others[row]) : a.positives[row];
  for (int column = threadIdx.x; column < columns; column += kWriteThreads) {
    float g = a.partners.rows > 0 ? a.sum[row * columns + column] * (1.f / kStored) : 0.f;
    if (paired) g = fmaf(positive, to_float(a.partners.data[row * a.partners.row_stride + column]), g);
    a.out[row * a.out_stride + column] = from_float<T>(factor * g);
  }
}

struct GradWorkspace {
  float* query_sum;       // [N, E]
  float* key_sum;         // [M, E]
  double* others;         // [2, pairs] InfoNCE: weights of the positives in the queries' and the keys' gradient
  float* positives;       // [pairs] SigLIP
  LineSums* row_sums;     // [kMaxTiles, kSuperblock]
  LineSums* column_sums;  // [2 kMaxTiles, kSuperblock]: on sm_90a a line per 64 rows
  void* grad;             // the superblock

  GradWorkspace(Workspace& workspace, int64_t n, int64_t m, int64_t e)
      : query_sum(workspace.take<float>(n * e)),
        key_sum(workspace.take<float>(m * e)),
        others(workspace.take<double>(2 * smaller(n, m))),
        positives(workspace.take<float>(smaller(n, m))),
        row_sums(workspace.take<LineSums>(kMaxTiles * kSuperblock<bf16>)),
        column_sums(workspace.take<LineSums>(2 * kMaxTiles * kSuperblock<bf16>)),
        grad(workspace.take<unsigned char>(larger(bytes<float>(n, m), bytes<bf16>(n, m)))) {}

  // As float at its smaller size or 16-bit at its larger one: `grad` has room for either.
  template <class T>
  static int64_t bytes(int64_t n, int64_t m) {
    return smaller(n, kSuperblock<T>) * leading<T>(m) * static_cast<int64_t>(sizeof(T));
  }
  // Elements from one row of the superblock to the next: whole 16-byte vectors.
  template <class T>
  static int leading(int64_t m) {
    return static_cast<int>((smaller(m, kSuperblock<T>) + 15) / 16 * 16);
  }
};

struct BackwardCall {
  const Tensor &grad_loss, &queries, &keys, &logit_scale;
  const float* bias;
  const double *lse_q, *lse_k;
  const Tensor &dqueries, &dkeys, &workspace;
  double weight;
  void* stream;

  int64_t pairs() const { return smaller(queries.size[0], keys.size[0]); }
};

template <class T>
Matrix<T> rows_from(Matrix<T> x, int first, int count) {
  x.data += first * x.row_stride;
  x.rows = count;
  return x;
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>(tiles_of(n)); }

// What the superblock's rows, or its columns, add to the weights of the positives.
void add_lines(const BackwardCall& call, const GradWorkspace& work, const LineSums* sums, int tiles, int stride,
               int first, int lines) {
  double* towards_x = work.others + first;
  const AddLinesParams params{sums, tiles, stride, lines, towards_x, towards_x + call.pairs()};
  launch("contrastive_add_lines", contrastive_add_lines_kernel,
         dim3(static_cast<unsigned>((lines + kLineThreads - 1) / kLineThreads)), kLineThreads, 0, call.stream, params);
}

// add_superblock by the kernels for sm_90a.
template <Loss kLoss>
void add_superblock_sm90(const BackwardCall& call, const GradWorkspace& work, int row0, int column0) {
  const int64_t n = call.queries.size[0], m = call.keys.size[0];
  constexpr int kSide = kSuperblock<bf16>;
  const int rows = static_cast<int>(smaller(n - row0, kSide)), columns = static_cast<int>(smaller(m - column0, kSide));
  const Superblock block{row0, column0, rows, columns, work.grad, GradWorkspace::leading<bf16>(m)};
  const Sm90Features x{call.queries, call.keys, call.logit_scale.ptr<float>(), call.bias};
  if constexpr (kLoss == Loss::infonce) {
    launch_infonce_grad_sm90(x, call.lse_q, call.lse_k, block, work.row_sums, work.column_sums, kSide, call.stream);
    const auto lines = [](int count, int tile) { return (count + tile - 1) / tile; };
    add_lines(call, work, work.row_sums, lines(columns, kSm90Columns), kSide, row0, rows);
    add_lines(call, work, work.column_sums, lines(rows, kSm90Rows), kSide, column0, columns);
  } else {
    launch_siglip_grad_sm90(x, block, work.positives, call.stream);
  }
  launch_accumulate_sm90(x, block, work.query_sum, work.key_sum, call.stream);
}

template <Loss kLoss, class T>
void add_superblock(const BackwardCall& call, const GradWorkspace& work, int row0, int column0) {
  const Matrix<T> queries = matrix_of<T>(call.queries), keys = matrix_of<T>(call.keys);
  const int e = queries.columns, ld = GradWorkspace::leading<T>(keys.rows);
  const int rows = static_cast<int>(smaller(queries.rows - row0, kSuperblock<T>));
  const int columns = static_cast<int>(smaller(keys.rows - column0, kSuperblock<T>));
  T* grad = static_cast<T*>(work.grad);
  const dim3 tiles(blocks_for(columns), blocks_for(rows));
  const GradTileParams<T> tile{queries,
                               keys,
                               call.logit_scale.ptr<float>(),
                               call.bias,
                               call.lse_q,
                               call.lse_k,
                               row0,
                               column0,
                               grad,
                               ld,
                               work.row_sums,
                               work.column_sums,
                               work.positives};
  launch("contrastive_grad_tile", contrastive_grad_tile_kernel<kLoss, T>, tiles, kThreads, kGemmBytes<T>, call.stream,
         tile);
  if constexpr (kLoss == Loss::infonce) {
    add_lines(call, work, work.row_sums, tiles.x, kSuperblock<T>, row0, rows);
    add_lines(call, work, work.column_sums, tiles.y, kSuperblock<T>, column0, columns);
  }

  const Matrix<T> g{grad, ld, rows, columns, true};
  const AccumulateParams<T> to_queries{g, rows_from(keys, column0, columns), rows, column0 == 0,
                                       work.query_sum + static_cast<int64_t>(row0) * e};
  launch("contrastive_accumulate_queries", contrastive_accumulate_kernel<Major::k, T>,
         dim3(blocks_for(e), blocks_for(rows)), kThreads, kGemmBytes<T>, call.stream, to_queries);
  const AccumulateParams<T> to_keys{g, rows_from(queries, row0, rows), columns, row0 == 0,
                                    work.key_sum + static_cast<int64_t>(column0) * e};
  launch("contrastive_accumulate_keys", contrastive_accumulate_kernel<Major::outer, T>,
         dim3(blocks_for(e), blocks_for(columns)), kThreads, kGemmBytes<T>, call.stream, to_keys);
}

template <class T>
void write_gradient(const BackwardCall& call, const float* sum, const double* others, const float* positives,
                    const Tensor& partners, const Tensor& out) {
  const WriteParams<T> params{sum,
                              others,
                              positives,
                              matrix_of<T>(partners),
                              static_cast<int>(call.pairs()),
                              call.grad_loss.ptr<float>(),
                              call.logit_scale.ptr<float>(),
                              call.weight,
                              out.ptr<T>(),
                              out.stride[0]};
  launch("contrastive_write", contrastive_write_kernel<T>, dim3(static_cast<unsigned>(out.size[0])), kWriteThreads, 0,
         call.stream, params);
}

template <Loss kLoss>
void run_backward(const BackwardCall& call) {
  const int64_t n = call.queries.size[0], m = call.keys.size[0], e = call.queries.size[1];
  if (n == 0 || e == 0) return;
  const DeviceGuard guard(call.queries);
  Workspace pieces(call.workspace);
  const GradWorkspace work(pieces, n, m, e);
  const bool infonce = kLoss == Loss::infonce;
  if (infonce) fill_zero(work.others, 2 * static_cast<size_t>(call.pairs()) * sizeof(double), call.stream);
  [[maybe_unused]] const bool sm90 = use_sm90(call.queries, call.keys);
  with_dtype(call.queries.dtype, "contrastive", [&](auto element) {
    using T = decltype(element);
    for (int row0 = 0; row0 < n; row0 += kSuperblock<T>) {
      for (int column0 = 0; column0 < m; column0 += kSuperblock<T>) {
        if constexpr (kHaveSm90) {
          if (sm90) {
            add_superblock_sm90<kLoss>(call, work, row0, column0);
            continue;
          }
        }
        add_superblock<kLoss, T>(call, work, row0, column0);
      }
    }
    const double *towards_x = infonce ? work.others : nullptr,
                 *towards_y = infonce ? towards_x + call.pairs() : nullptr;
    write_gradient<T>(call, work.query_sum, towards_x, work.positives, call.keys, call.dqueries);
    write_gradient<T>(call, work.key_sum, towards_y, work.positives, call.queries, call.dkeys);
  });
}

int64_t backward_workspace(int64_t n, int64_t m, int64_t e) {
  Workspace workspace;
  GradWorkspace(workspace, n, m, e);
  return workspace.used();
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

int64_t contrastive_infonce_bwd_workspace_cuda(int64_t n, int64_t m, int64_t e) {
  return cuda::backward_workspace(n, m, e);
}

void launch_contrastive_infonce_bwd_cuda(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys,
                                         const Tensor& logit_scale, const Tensor& lse_q, const Tensor& lse_k,
                                         const Tensor& dqueries, const Tensor& dkeys, const Tensor& workspace,
                                         void* stream) {
  cuda::run_backward<cuda::Loss::infonce>({grad_loss, queries, keys, logit_scale, nullptr, lse_q.ptr<double>(),
                                           lse_k.ptr<double>(), dqueries, dkeys, workspace,
                                           0.5 / static_cast<double>(queries.size[0]), stream});
}

int64_t contrastive_siglip_bwd_workspace_cuda(int64_t n, int64_t m, int64_t e) {
  return cuda::backward_workspace(n, m, e);
}

void launch_contrastive_siglip_bwd_cuda(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys,
                                        const Tensor& logit_scale, const Tensor& logit_bias, const Tensor& dqueries,
                                        const Tensor& dkeys, const Tensor& workspace, void* stream) {
  cuda::run_backward<cuda::Loss::siglip>({grad_loss, queries, keys, logit_scale, logit_bias.ptr<float>(), nullptr,
                                          nullptr, dqueries, dkeys, workspace,
                                          1. / static_cast<double>(queries.size[0]), stream});
}

}  // namespace mmk
