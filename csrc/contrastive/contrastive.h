// Contrastive losses over queries X [N, E] and keys Y [M, E]: forward statistics and feature gradients.
//
// logits s_ij = scale * <x_i, y_j>, never stored as an N x M matrix. See mmkernels/ops/contrastive/README.md.
//
//   infonce  loss = 1/2N * sum_i (lse_q[i] - s_ii) + (lse_k[i] - s_ii)          (N == M)
//            lse_q[i] = log sum_j exp s_ij,  lse_k[j] = log sum_i exp s_ij
//   siglip   loss = -1/N * sum_ij log sigmoid(z_ij * (s_ij + bias)),  z_ij = +1 where i == j, else -1
//
// Dtypes: queries, keys and their gradients share one of f32, bf16, f16, f64. Everything else is float32, or float64
// for float64 features; products accumulate in that type. lse_q and lse_k are always float64: the backward computes p =
// exp(s - lse), and rounding an lse of 14 to float32 would alone put an error of 5e-7 into every p. Scalars ([]) are
// tensors of one element and ndim 0; their `given()` is false, their `data` is not null. The last dimension of every
// matrix is contiguous; row strides are arbitrary. N == 0 gives loss 0 and writes no gradient. NaN and inf in the input
// propagate to the loss. On CPU a feature gradient that is not given is not computed (a frozen tower); on CUDA both are
// always given.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

// ---- CPU ------------------------------------------------------------------------------------------------------------

// Which pairs are positive: with ids and without `ignore`, pairs with equal ids; otherwise targets[i] of row i, -1 for
// none. With `ignore`, other pairs with equal ids are not seen.
struct PairArguments {
  Tensor targets;    // [N] int64, or not given
  Tensor query_ids;  // [N] int32, or not given
  Tensor key_ids;    // [M] int32, or not given
  bool ignore;
};

// Soft targets: the softmax of the logits of other features, whose lse are known. All given (lse_k only with columns)
// or none.
struct TeacherArguments {
  Tensor queries;  // [N, F]
  Tensor keys;     // [M, F]
  Tensor lse_q;    // [N] float64
  Tensor lse_k;    // [M] float64
};

// A filter of what a row sees: keys whose similarity to its query under other features is above the row's threshold are
// left out, except its target. All given or none; neither with a teacher nor with columns.
struct GuideArguments {
  Tensor queries;     // [N, F]
  Tensor keys;        // [M, F]
  Tensor thresholds;  // [N] float64
};

// Lines of the statistics, as documented in mmkernels/ops/contrastive/types.py. The first kCoefficients are
// differentiable; a backward takes one coefficient for each.
enum Statistic { kLse, kPositive, kTotal, kTeacher, kMean, kTop, kBest, kStatistics, kCoefficients = kMean };

// Statistics of `count` rows or columns, or the coefficients of the first lines.
struct StatisticLines {
  double* data;
  int64_t count;

  double& at(Statistic line, int64_t i) const { return data[line * count + i]; }
};

struct SoftmaxForwardArguments {
  Tensor queries;      // [N, E]
  Tensor keys;         // [M, E]
  Tensor logit_scale;  // []
  PairArguments pairs;
  TeacherArguments teacher;
  GuideArguments guide;
  bool totals, columns;
  // outputs
  Tensor rows_out;     // [kStatistics, N] float64
  Tensor columns_out;  // [kStatistics, M] float64; empty without `columns`
};

// The gradient of the sum of coefficients times statistics; lse may cover more rows or columns than these features.
struct SoftmaxBackwardArguments {
  Tensor coefficients_q;  // [kCoefficients, N] float64
  Tensor coefficients_k;  // [kCoefficients, M] float64; empty without `columns`
  Tensor lse_q;           // [N] float64
  Tensor lse_k;           // [M] float64
  Tensor queries;         // [N, E]
  Tensor keys;            // [M, E]
  Tensor logit_scale;     // []
  PairArguments pairs;
  TeacherArguments teacher;
  GuideArguments guide;
  bool columns;
  // outputs
  Tensor dqueries;  // [N, E], or not given
  Tensor dkeys;     // [M, E], or not given
};

struct ContrastiveKernels {
  void (*softmax_fwd)(const SoftmaxForwardArguments& arguments, int num_threads);
  void (*softmax_bwd)(const SoftmaxBackwardArguments& arguments, int num_threads);
  // sums [3] float64: all pairs' losses, and the derivatives by scale and bias
  void (*sigmoid_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                      const PairArguments& pairs, const Tensor& sums, int num_threads);
  void (*sigmoid_bwd)(const Tensor& grad_sum, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                      const Tensor& logit_bias, const PairArguments& pairs, const Tensor& dqueries, const Tensor& dkeys,
                      int num_threads);
  // The plain losses, with the arguments of the CUDA launchers below.
  void (*infonce_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& loss,
                      const Tensor& lse_q, const Tensor& lse_k, const Tensor& grad_scale, int num_threads);
  void (*infonce_bwd)(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                      const Tensor& lse_q, const Tensor& lse_k, const Tensor& dqueries, const Tensor& dkeys,
                      int num_threads);
  void (*siglip_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                     const Tensor& loss, const Tensor& grad_scale, const Tensor& grad_bias, int num_threads);
  void (*siglip_bwd)(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                     const Tensor& logit_bias, const Tensor& dqueries, const Tensor& dkeys, int num_threads);
  // index [N] int64: a negative key drawn by softmax with noise from seed [2] int64; -1 if there is none
  void (*sample_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& seed,
                     const PairArguments& pairs, const Tensor& index, int num_threads);
  // values [N, k], indices [N, k] int64
  void (*topk_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& indices,
                   int num_threads);
};
MMK_DECLARE_KERNELS(ContrastiveKernels, contrastive)

// ---- CUDA -----------------------------------------------------------------------------------------------------------
// The launchers neither allocate nor synchronise: scalars stay on the device, and the caller passes a uint8 workspace,
// 256-byte aligned, of the size given by the function next to the launcher. Features are f32, bf16, f16. `stream` is a
// cudaStream_t. A failed launch throws std::runtime_error.

int64_t contrastive_infonce_fwd_workspace_cuda(int64_t n, int64_t m, int64_t e);
void launch_contrastive_infonce_fwd_cuda(const Tensor& queries,      // [N, E]
                                         const Tensor& keys,         // [M, E], M == N
                                         const Tensor& logit_scale,  // [] float32
                                         // outputs
                                         const Tensor& loss,        // []
                                         const Tensor& lse_q,       // [N] natural log
                                         const Tensor& lse_k,       // [M] natural log
                                         const Tensor& grad_scale,  // []
                                         const Tensor& workspace, void* stream);

int64_t contrastive_infonce_bwd_workspace_cuda(int64_t n, int64_t m, int64_t e);
void launch_contrastive_infonce_bwd_cuda(const Tensor& grad_loss,    // [] float32
                                         const Tensor& queries,      // [N, E]
                                         const Tensor& keys,         // [M, E]
                                         const Tensor& logit_scale,  // [] float32
                                         const Tensor& lse_q,        // [N]
                                         const Tensor& lse_k,        // [M]
                                         // outputs
                                         const Tensor& dqueries,  // [N, E]
                                         const Tensor& dkeys,     // [M, E]
                                         const Tensor& workspace, void* stream);

int64_t contrastive_siglip_fwd_workspace_cuda(int64_t n, int64_t m, int64_t e);
void launch_contrastive_siglip_fwd_cuda(const Tensor& queries,      // [N, E]
                                        const Tensor& keys,         // [M, E]
                                        const Tensor& logit_scale,  // [] float32
                                        const Tensor& logit_bias,   // [] float32
                                        // outputs
                                        const Tensor& loss,        // []
                                        const Tensor& grad_scale,  // []
                                        const Tensor& grad_bias,   // []
                                        const Tensor& workspace, void* stream);

int64_t contrastive_siglip_bwd_workspace_cuda(int64_t n, int64_t m, int64_t e);
void launch_contrastive_siglip_bwd_cuda(const Tensor& grad_loss,    // [] float32
                                        const Tensor& queries,      // [N, E]
                                        const Tensor& keys,         // [M, E]
                                        const Tensor& logit_scale,  // [] float32
                                        const Tensor& logit_bias,   // [] float32
                                        // outputs
                                        const Tensor& dqueries,  // [N, E]
                                        const Tensor& dkeys,     // [M, E]
                                        const Tensor& workspace, void* stream);

}  // namespace mmk
