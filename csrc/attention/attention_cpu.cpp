// Attention on the CPU, compiled once per instruction set; see the headers for maths and tiling.
#include "attention/attention_cpu_bwd.h"
#include "attention/attention_cpu_fwd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

void forward_any(const AttentionFwdArgs& args, int num_threads) {
  with_dtype(args.q.dtype, [&](auto t) { forward<decltype(t)>(args, num_threads); });
}

void backward_any(const AttentionBwdArgs& args, int num_threads) {
  with_dtype(args.q.dtype, [&](auto t) { backward<decltype(t)>(args, num_threads); });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(AttentionKernels, attention) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
