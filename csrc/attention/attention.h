// Packed attention with a row-interval mask: arguments of the CPU and CUDA launchers.
//
// Query head h reads key/value head h / (H / Hkv). With s_ij = scale * <q_i, k_j> over the keys lo[i] <= j < hi[i]:
//   lse_i = log sum_j exp(s_ij)      out_i = sum_j exp(s_ij - lse_i) v_j
// A query that sees no key (lo[i] >= hi[i]) gives out 0, lse -inf and adds zero to every gradient. first_q/last_q only
// bound a key's loop over queries: some queries between them may not see it. lo, hi, first_q and last_q are arbitrary
// for empty intervals; launchers clamp lo and hi to [0, Tk], first_q and last_q to [0, Tq].
//
// Shapes; the last dimension of each is contiguous, the others have strides:
//   q [Tq, H, D]  k [Tk, Hkv, D]  v [Tk, Hkv, Dv]  out, grad_out [Tq, H, Dv]   one dtype: f32, bf16, f16 (CPU: f64 too)
//   lse, grad_lse, delta [H, Tq]                                               f32 (f64 with f64); contiguous
//   lo, hi [Tq]  first_q, last_q [Tk]                                          int32, contiguous; half-open intervals
//   AttentionExtras: further inputs of the CPU kernels; the sm_90 CUDA kernels take its pattern. Maths in
//   mmkernels/ops/attention/reference.py
// D and Dv may be any number from 1 to 256 (CPU: no upper bound). Tq and Tk may be 0. Every element of every output is
// written.
#pragma once

#include "common/dispatch.h"
#include "common/tensor.h"

namespace mmk {

struct AttentionMask {
  Tensor lo, hi;           // [Tq] keys that each query sees
  Tensor first_q, last_q;  // [Tk] hull of the queries that see each key
};

// Contiguous; a tensor that is not given has no effect. int32, f32 like lse (f64 with f64), seed int64.
struct AttentionExtras {
  // pattern: inside its interval a query sees a key if span_q == span_k or allow_q & bit_k; all five, or none
  Tensor span_q, span_k, allow_q, bit_k;  // [Tq] [Tk] [Tq] [Tk]
  Tensor tiles;                           // [ceil(Tq / 128), ceil(ceil(Tk / 64) / 16)]: two bits per 128 x 64 tile
  // logit bias: all of them (row_sums, an output, in the backward), or none
  Tensor class_q, class_k;  // [Tq] [Tk]
  Tensor pair_bias;         // [H, Cq, Ck]
  Tensor row_sums;          // [H, Ck, Tq]: sums of dS over the keys of a class
  Tensor sink;              // [H]
  Tensor seed;              // [1], given with dropout
  // distances, both or neither: s_ij - slopes[h] * |at_q[i] - j|; distance_sums, an output of the backward, is like lse
  Tensor at_q, slopes;   // [Tq] [H]
  Tensor distance_sums;  // [H, Tq]: sums of dS times distance
  Tensor row_max;        // [H, Tq], an output of the forward: largest scaled product that a query sees, before all else
  double dropout_p = 0;
  double softcap = 0;  // of the scaled products, before the bias: softcap tanh(x / softcap); 0: none
};

struct AttentionFwdArgs {
  // inputs
  Tensor q, k, v;
  AttentionMask mask;
  double scale;
  // outputs
  Tensor out, lse;
  AttentionExtras extras = {};
};

struct AttentionBwdArgs {
  // inputs
  Tensor grad_out, grad_lse;  // grad_lse not given: zero
  Tensor q, k, v, out, lse;
  AttentionMask mask;
  double scale;
  // outputs
  Tensor dq, dk, dv;  // shapes and dtypes of q, k, v
  Tensor delta;       // [H, Tq]: rowsum(grad_out * out) - grad_lse; on the CPU without out's rounding if possible
  AttentionExtras extras = {};
};

struct AttentionKernels {
  void (*forward)(const AttentionFwdArgs& args, int num_threads);
  void (*backward)(const AttentionBwdArgs& args, int num_threads);
};
MMK_DECLARE_KERNELS(AttentionKernels, attention)

// `stream` is a cudaStream_t. No atomics: results are bitwise reproducible.
void launch_attention_fwd_cuda(const AttentionFwdArgs& args, void* stream);
void launch_attention_bwd_cuda(const AttentionBwdArgs& args, void* stream);

}  // namespace mmk
