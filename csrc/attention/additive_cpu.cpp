// Additive attention on the CPU, compiled once per instruction set; see the headers for maths and tiling.
#include "attention/additive_cpu_bwd.h"
#include "attention/additive_cpu_fwd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

void forward_any(const AdditiveFwdArgs& args, int num_threads) {
  with_dtype(args.q.dtype, [&](auto t) { additive::forward<decltype(t)>(args, num_threads); });
}

void backward_any(const AdditiveBwdArgs& args, int num_threads) {
  with_dtype(args.q.dtype, [&](auto t) { additive::backward<decltype(t)>(args, num_threads); });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(AdditiveKernels, additive) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
