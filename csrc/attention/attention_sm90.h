// The attention kernels for compute capability 9.0 (wgmma, TMA, warps with different work): what attention_fwd.cu and
// attention_bwd.cu launch there in place of their own. They also take a pattern: spans and classes inside the
// intervals.
#pragma once

#include "attention/attention.h"
#include "common/check.h"
#include "common/cuda/box.h"
#include "common/cuda/launch.h"

namespace mmk::cuda {

constexpr int kMaxSm90HeadDim = 128;

// Whether the kernels below take these tensors [tokens, heads, D or Dv] on the current device: bf16 or f16, head dims
// up to 128, at an address and strides that TMA can follow (multiples of 16 bytes).
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

// For the other kernels, which a pattern of no pair does not harm.
template <class Args>
void expect_no_pattern(const Args& args) {
  MMK_CHECK(!args.extras.tiles.given() || args.q.size[0] == 0 || args.k.size[0] == 0,
            "attention: of the CUDA kernels only those for sm_90 take spans and classes");
}

void launch_attention_fwd_sm90(const AttentionFwdArgs& args, void* stream);
// After delta.
void launch_attention_bwd_sm90(const AttentionBwdArgs& args, void* stream);

}  // namespace mmk::cuda
