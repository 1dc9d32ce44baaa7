// Gated residual on the CPU: a task is a strip of rows. tanh is computed once per gate; each strip sums the gate's
// gradient into its own line of a scratch matrix.
#include "attention/gate.h"

#include <type_traits>

#include "attention/rows.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kStripElements = 32768;

// tanh(gate), padded to whole vectors.
template <class C>
struct OpenGate {
  AlignedBuffer<C> value;
  int64_t count;
  explicit OpenGate(const Tensor& gate) : value(padded(gate.size[0])), count(gate.size[0]) {
    each_vector<C>(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      write(value.data() + i, tanh(read(gate.ptr<const C>() + i, n)), n);
    });
  }
};

template <class R, class X>
void forward(const GateFwdArgs& args, int num_threads) {
  using C = ComputeOf<R>;
  const int64_t N = args.x.size[0], width = args.x.size[1];
  const OpenGate<C> gate(args.gate);
  const Strips strips(N, width, kStripElements);
  parallel_for(strips.count(), num_threads, [&](int64_t strip, int) {
    for (int64_t n = strips.begin(strip); n < strips.end(strip); ++n) {
      const R* residual = args.residual.ptr<const R>() + n * args.residual.stride[0];
      const X* x = args.x.ptr<const X>() + n * args.x.stride[0];
      R* out = args.out.ptr<R>() + n * width;
      const C of_row = args.by_column ? 0 : gate.value.data()[n % gate.count];
      each_vector<C>(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const auto g = args.by_column ? read(gate.value.data() + c, count) : splat(of_row);
        write(out + c, read(residual + c, count) + g * read(x + c, count), count);
      });
    }
  });
}

template <class R, class X>
void backward(const GateBwdArgs& args, int num_threads) {
  using C = ComputeOf<R>;
  const int64_t N = args.x.size[0], width = args.x.size[1];
  const OpenGate<C> gate(args.gate);
  const Strips strips(N, width, kStripElements);
  const int64_t line = padded(gate.count);
  AlignedBuffer<double> sums(strips.count() * line);
  AlignedBuffer<C> memory(usable_threads(strips.count(), num_threads) * 2 * line);
  parallel_for(strips.count(), num_threads, [&](int64_t strip, int thread) {
    double* const sum = sums.data() + strip * line;
    C *const part = memory.data() + thread * 2 * line, *const total = part + line;
    for (int64_t i = 0; i < line; ++i) sum[i] = part[i] = total[i] = 0;
    for (int64_t n = strips.begin(strip); n < strips.end(strip); ++n) {
      const R* grad = args.grad_out.ptr<const R>() + n * args.grad_out.stride[0];
      const X* x = args.x.ptr<const X>() + n * args.x.stride[0];
      X* dx = args.dx.ptr<X>() + n * width;
      if (args.by_column) {
        each_vector<C>(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          const auto g = read(grad + c, count);
          write(dx + c, g * read(gate.value.data() + c, count), count);
          write(part + c, read(part + c, count) + g * read(x + c, count), count);
        });
        if ((n + 1) % kRowsPerPart == 0) add_part(part, total, line);
        continue;
      }
      const int64_t which = n % gate.count;
      const C of_row = gate.value.data()[which];
      Vec<C> products = {};
      each_vector<C>(width, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const auto g = read(grad + c, count);
        write(dx + c, g * of_row, count);
        products += g * read(x + c, count);
      });
      sum[which] += static_cast<double>(reduce_add(products));
    }
    if (!args.by_column) return;
    add_part(part, total, line);
    for (int64_t i = 0; i < line; ++i) sum[i] = static_cast<double>(total[i]);
  });
  C* const dgate = args.dgate.ptr<C>();
  sum_lines(sums.data(), strips.count(), line, gate.count, dgate);
  for (int64_t i = 0; i < gate.count; ++i) {
    const C t = gate.value.data()[i];
    dgate[i] *= (1 - t) * (1 + t);
  }
}

// Calls run(residual's type, x's type); a float32 residual may have x in half precision.
template <class Run>
void with_dtypes(DType residual, DType x, const Run& run) {
  with_dtype(x, [&](auto t) {
    if constexpr (sizeof(t) == 2) {
      if (residual == DType::f32) return run(float{}, t);
    }
    run(t, t);
  });
}

void forward_any(const GateFwdArgs& args, int num_threads) {
  with_dtypes(args.residual.dtype, args.x.dtype,
              [&](auto r, auto x) { forward<decltype(r), decltype(x)>(args, num_threads); });
}

void backward_any(const GateBwdArgs& args, int num_threads) {
  with_dtypes(args.grad_out.dtype, args.x.dtype,
              [&](auto r, auto x) { backward<decltype(r), decltype(x)>(args, num_threads); });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(GateKernels, gate) = {&MMK_ISA::forward_any, &MMK_ISA::backward_any};

}  // namespace mmk
