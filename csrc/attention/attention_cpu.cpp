// Attention on the CPU, compiled once per instruction set; the maths and the tiling are in the two headers.
#include "attention/attention_cpu_bwd.h"
#include "attention/attention_cpu_fwd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

void forward_any(const AttentionFwdArgs& args, int num_threads) {
  switch (args.q.dtype) {
    case DType::f32:
      return forward<float>(args, num_threads);
    case DType::bf16:
      return forward<bf16>(args, num_threads);
    case DType::f16:
      return forward<f16>(args, num_threads);
    case DType::f64:
      return forward<double>(args, num_threads);
  }
}

void backward_any(const AttentionBwdArgs& args, int num_threads) {
  switch (args.q.dtype) {
    case DType::f32:
      return backward<float>(args, num_threads);
    case DType::bf16:
      return backward<bf16>(args, num_threads);
    case DType::f16:
      return backward<f16>(args, num_threads);
    case DType::f64:
      return backward<double>(args, num_threads);
  }
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(AttentionKernels, attention) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
