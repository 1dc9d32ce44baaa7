// Contrastive losses over queries X [N, E] and keys Y [M, E]: forward statistics and feature gradients.
//
// logits s_ij = scale * <x_i, y_j>, never stored as an N x M matrix. See mmkernels/ops/contrastive/README.md.
//
//   infonce  loss = 1/2N * sum_i (lse_q[i] - s_ii) + (lse_k[i] - s_ii)          (N == M)
//            lse_q[i] = log sum_j exp s_ij,  lse_k[j] = log sum_i exp s_ij
//   siglip   loss = -1/N * sum_ij log sigmoid(z_ij * (s_ij + bias)),  z_ij = +1 where i == j, else -1
//
// Dtypes: queries, keys and their gradients share one of f32, bf16, f16, f64. Everything else is float32, or float64
// when the features are: products accumulate in that type. lse_q and lse_k are float64 whatever the features: the
// backward takes p = exp(s - lse), and a float32 lse of 14 would by itself put 5e-7 into every p. Scalars ([]) are
// tensors of one element and ndim 0; their `given()` is false, their `data` is not null. The last dimension of every
// matrix is contiguous (stride 1); row strides are free. N == 0 gives loss 0 and writes no gradient. A NaN or an
// infinity in the input reaches the loss as it would in plain arithmetic. On CPU a feature gradient that is not given
// is not computed (a frozen tower); on CUDA both are always given.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

// ---- CPU ------------------------------------------------------------------------------------------------------------

struct ContrastiveKernels {
  void (*infonce_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& loss,
                      const Tensor& lse_q, const Tensor& lse_k, const Tensor& grad_scale, int num_threads);
  void (*infonce_bwd)(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                      const Tensor& lse_q, const Tensor& lse_k, const Tensor& dqueries, const Tensor& dkeys,
                      int num_threads);
  void (*siglip_fwd)(const Tensor& queries, const Tensor& keys, const Tensor& logit_scale, const Tensor& logit_bias,
                     const Tensor& loss, const Tensor& grad_scale, const Tensor& grad_bias, int num_threads);
  void (*siglip_bwd)(const Tensor& grad_loss, const Tensor& queries, const Tensor& keys, const Tensor& logit_scale,
                     const Tensor& logit_bias, const Tensor& dqueries, const Tensor& dkeys, int num_threads);
};
MMK_DECLARE_KERNELS(ContrastiveKernels, contrastive)

static inline void launch_contrastive_infonce_fwd_cpu(const Tensor& queries,      // [N, E]
                                                      const Tensor& keys,         // [M, E], M == N
                                                      const Tensor& logit_scale,  // []
                                                      // outputs
                                                      const Tensor& loss,        // []
                                                      const Tensor& lse_q,       // [N] natural log
                                                      const Tensor& lse_k,       // [M] natural log
                                                      const Tensor& grad_scale,  // [] d loss / d logit_scale
                                                      int num_threads) {
  contrastive_kernels().infonce_fwd(queries, keys, logit_scale, loss, lse_q, lse_k, grad_scale, num_threads);
}

static inline void launch_contrastive_infonce_bwd_cpu(const Tensor& grad_loss,    // []
                                                      const Tensor& queries,      // [N, E]
                                                      const Tensor& keys,         // [M, E]
                                                      const Tensor& logit_scale,  // []
                                                      const Tensor& lse_q,        // [N]
                                                      const Tensor& lse_k,        // [M]
                                                      // outputs
                                                      const Tensor& dqueries,  // [N, E]
                                                      const Tensor& dkeys,     // [M, E]
                                                      int num_threads) {
  contrastive_kernels().infonce_bwd(grad_loss, queries, keys, logit_scale, lse_q, lse_k, dqueries, dkeys, num_threads);
}

static inline void launch_contrastive_siglip_fwd_cpu(const Tensor& queries,      // [N, E]
                                                     const Tensor& keys,         // [M, E]
                                                     const Tensor& logit_scale,  // []
                                                     const Tensor& logit_bias,   // []
                                                     // outputs
                                                     const Tensor& loss,        // []
                                                     const Tensor& grad_scale,  // [] d loss / d logit_scale
                                                     const Tensor& grad_bias,   // [] d loss / d logit_bias
                                                     int num_threads) {
  contrastive_kernels().siglip_fwd(queries, keys, logit_scale, logit_bias, loss, grad_scale, grad_bias, num_threads);
}

static inline void launch_contrastive_siglip_bwd_cpu(const Tensor& grad_loss,    // []
                                                     const Tensor& queries,      // [N, E]
                                                     const Tensor& keys,         // [M, E]
                                                     const Tensor& logit_scale,  // []
                                                     const Tensor& logit_bias,   // []
                                                     // outputs
                                                     const Tensor& dqueries,  // [N, E]
                                                     const Tensor& dkeys,     // [M, E]
                                                     int num_threads) {
  contrastive_kernels().siglip_bwd(grad_loss, queries, keys, logit_scale, logit_bias, dqueries, dkeys, num_threads);
}

// ---- CUDA -----------------------------------------------------------------------------------------------------------
// The launchers allocate nothing and do not synchronise: scalars stay on the device, and the caller passes a workspace
// of uint8 with as many bytes as the function beside the launcher says (256-byte aligned). Features are f32, bf16, f16.
// `stream` is a cudaStream_t. A failed launch throws std::runtime_error.

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
