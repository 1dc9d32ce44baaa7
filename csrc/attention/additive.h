// Additive attention: s_ij = sum_d w_d tanh(q_id + k_jd + b_d) over the visible pairs of a mask.
//
//   lse_i = log sum_j exp(s_ij)     out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
//   visible(i, j) = lo[i] <= j < hi[i] and (no pattern, or span_q[i] == span_k[j], or allow_q[i] & bit_k[j] != 0)
// Backward, with delta_i = <do_i, out_i> - dlse_i, ds_ij = p_ij (<do_i, v_j> - delta_i), t = tanh(...):
//   dq_i = sum_j ds_ij w (1 - t_ij^2)    dk_j = sum_i of the same    dw = sum_ij ds_ij t_ij    dv_j = sum_i p_ij do_i
// Query head h reads key/value head h / (H / Hkv). A query that sees no key gives out 0, lse -inf, zero gradients.
//
// Shapes; the last dimension of each is contiguous:
//   q [Tq, H, D]  k, dk [Tk, Hkv, D]  v, dv [Tk, Hkv, Dv]  out, grad_out [Tq, H, Dv]   one dtype: f32, bf16, f16, f64
//   w, bias, dw [H, D]  dq [Tq, H, D]  lse, grad_lse [H, Tq]                           f32 (f64 with f64), contiguous
//   lo, hi, span_q, allow_q, first_q.. as in AttentionMask                             int32, contiguous
// Inputs may have strides, outputs are contiguous. Tq and Tk may be 0. Results do not depend on the number of threads.
#pragma once

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

struct AdditiveMask {
  Tensor lo, hi;                          // [Tq]
  Tensor first_q, last_q;                 // [Tk] hull of the queries that see a key; bounds loops only
  Tensor span_q, span_k, allow_q, bit_k;  // [Tq], [Tk], [Tq], [Tk]: the pattern; all given or none
};

struct AdditiveFwdArgs {
  // inputs
  Tensor q, k, v, w, bias;
  AdditiveMask mask;
  // outputs
  Tensor out, lse;
};

struct AdditiveBwdArgs {
  // inputs
  Tensor grad_out, grad_lse;  // grad_lse not given: zero
  Tensor q, k, v, w, bias, out, lse;
  AdditiveMask mask;
  // outputs
  Tensor dq, dk, dv, dw;
};

struct AdditiveKernels {
  void (*forward)(const AdditiveFwdArgs& args, int num_threads);
  void (*backward)(const AdditiveBwdArgs& args, int num_threads);
};
MMK_DECLARE_KERNELS(AdditiveKernels, additive)

}  // namespace mmk
