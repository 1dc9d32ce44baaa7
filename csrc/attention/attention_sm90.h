// The attention kernels for compute capability 9.0 (wgmma, TMA, warp specialisation), which attention_fwd.cu and
// attention_bwd.cu launch instead of their own. They also support a pattern: spans and classes inside the intervals.
#pragma once

#include "attention/attention.h"
#include "common/check.h"
#include "common/cuda/box.h"
#include "common/cuda/launch.h"

namespace mmk::cuda {

constexpr int kMaxSm90HeadDim = 128;

// Whether the kernels below support these tensors [tokens, heads, D or Dv] on the current device: bf16 or f16, head
// dims up to 128, address and strides in multiples of 16 bytes for TMA.
template <class... Tensors>
bool use_attention_sm90(const Tensors&... tensors) {
  if constexpr (kHaveSm90) {
    const auto serves = [](const Tensor& x) {
      return (x.dtype == DType::bf16 || x.dtype == DType::f16) && x.size[0] > 0 && x.size[2] <= kMaxSm90HeadDim &&
             tma_serves(x);
    };
    return (serves(tensors) && ...) && compute_capability() == 90;
  } else {
    return false;
  }
}

// For the other kernels: rejects a pattern unless there are no pairs.
template <class Args>
void expect_no_pattern(const Args& args) {
  MMK_CHECK(!args.extras.tiles.given() || args.q.size[0] == 0 || args.k.size[0] == 0,
            "attention: only the sm_90 CUDA kernels support spans and classes");
}

void launch_attention_fwd_sm90(const AttentionFwdArgs& args, void* stream);
// The backward; both require delta.
void launch_attention_dkdv_sm90(const AttentionBwdArgs& args, void* stream);
void launch_attention_dq_sm90(const AttentionBwdArgs& args, void* stream);

}  // namespace mmk::cuda
