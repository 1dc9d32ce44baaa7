// Elementary functions of csrc/common/simd against long double, and the speed of exp2.
#include "common/parallel.h"
#include "common/simd/math.h"
#include "simd_test_cpu.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class E>
using Unary = Vec<E> (*)(Vec<E>);
using Exact = long double (*)(long double);

template <class E>
double ulp_of(long double y) {
  int e;
  frexpl(fabsl(y), &e);
  return ldexp(1.0, e - 1 - FloatTraits<E>::mantissa_bits);
}

// The largest error over a sweep must stay within `bound` ulp; results below the normal range must be 0 (or within it).
template <class E>
void sweep(const char* name, Unary<E> f, Exact exact, double low, double high, bool by_exponent, double bound,
           Failures& fail) {
  constexpr int L = kLanes<E>;
  Random random;
  double worst = 0, worst_x = 0;
  for (int round = 0; round < 400000 / L; ++round) {
    E x[L], y[L];
    for (int i = 0; i < L; ++i) {
      const double u = random.uniform(low, high);
      x[i] = static_cast<E>(by_exponent ? ::exp2(u) : u);
    }
    store(y, f(load(x)));
    for (int i = 0; i < L; ++i) {
      const long double want = exact(static_cast<long double>(x[i]));
      if (fabsl(want) < static_cast<long double>(FloatTraits<E>::smallest_normal)) {
        const bool ok = y[i] == 0 || fabsl(y[i] - want) <= bound * ulp_of<E>(FloatTraits<E>::smallest_normal);
        if (fail(ok)) printf("  %s(%a) = %a, expected 0\n", name, double(x[i]), double(y[i]));
        continue;
      }
      const double error = static_cast<double>(fabsl(y[i] - want)) / ulp_of<E>(want);
      if (!(error <= worst)) worst = error, worst_x = x[i];
    }
  }
  printf("  %s<%s> on [%g, %g]: %.2f ulp\n", name, sizeof(E) == 4 ? "float" : "double", low, high, worst);
  if (fail(worst <= bound)) printf("  ... at %a, bound %g\n", worst_x, bound);
}

template <class E>
void check_special(const char* name, Unary<E> f, double x, double want, Failures& fail) {
  const double got = f(splat(static_cast<E>(x)))[kLanes<E> - 1];
  if (fail(isnan(want) ? isnan(got) != 0 : got == want)) printf("  %s(%g) = %g, expected %g\n", name, x, got, want);
}

template <class E>
void check_math(Failures& fail) {
  const bool wide = sizeof(E) == 8;
  const double low = wide ? -1022 : -126, high = wide ? 1024 : 128, ln2 = 0.69314718055994530942;
  const Unary<E> f_exp2 = [](Vec<E> x) { return exp2(x); }, f_exp = [](Vec<E> x) { return exp(x); },
                 f_log2 = [](Vec<E> x) { return log2(x); }, f_log2_1p = [](Vec<E> x) { return log2_1p(x); },
                 f_log_sigmoid = [](Vec<E> x) { return log_sigmoid(x); }, f_tanh = [](Vec<E> x) { return tanh(x); },
                 f_tanh_too = [](Vec<E> x) { return tanh(x, x); }, f_tanh_slope = [](Vec<E> x) {
                   Vec<E> slope;
                   tanh(x, slope);
                   return slope;
                 };
  const Exact tanh_slopel = [](long double x) { return 1 / (coshl(x) * coshl(x)); };
  const Exact log2_1pl = [](long double x) { return log1pl(x) * 1.44269504088896340736L; };
  const Exact log_sigmoidl = [](long double x) { return x < 0 ? x - log1pl(expl(x)) : -log1pl(expl(-x)); };

  sweep<E>("exp2", f_exp2, exp2l, low - 2, high, false, 1.25, fail);
  sweep<E>("exp2", f_exp2, exp2l, -2, 2, false, 1.25, fail);
  sweep<E>("exp", f_exp, expl, (low - 2) * ln2, high * ln2 * (1 - 1e-7), false, 1.5, fail);
  sweep<E>("exp", f_exp, expl, -2, 2, false, 1.5, fail);
  sweep<E>("log2 of 2^x", f_log2, log2l, low - 20, high - 1e-6, true, 1.25, fail);  // from subnormals on
  sweep<E>("log2 of 2^x", f_log2, log2l, -1, 1, true, 1.25, fail);
  sweep<E>("log2", f_log2, log2l, 0.999, 1.001, false, 1.25, fail);
  sweep<E>("log2_1p", f_log2_1p, log2_1pl, 0, 1, false, 1.25, fail);
  sweep<E>("log2_1p of 2^x", f_log2_1p, log2_1pl, low, 0, true, 1.25, fail);
  sweep<E>("log_sigmoid", f_log_sigmoid, log_sigmoidl, -100, 100, false, 2.5, fail);
  sweep<E>("log_sigmoid", f_log_sigmoid, log_sigmoidl, -1, 1, false, 2.5, fail);
  for (Unary<E> f : {f_tanh, f_tanh_too}) {
    sweep<E>("tanh", f, tanhl, -1, 1, false, 2, fail);
    sweep<E>("tanh", f, tanhl, -30, 30, false, 2, fail);
    sweep<E>("tanh of 2^x", f, tanhl, low / 2, high - 1e-6, true, 2, fail);
  }
  sweep<E>("derivative of tanh", f_tanh_slope, tanh_slopel, -1, 1, false, 4, fail);
  sweep<E>("derivative of tanh", f_tanh_slope, tanh_slopel, -40, 40, false, 4, fail);

  for (Unary<E> f : {f_exp2, f_exp}) {
    check_special<E>("exp", f, -INFINITY, 0, fail);
    check_special<E>("exp", f, INFINITY, INFINITY, fail);
    check_special<E>("exp", f, NAN, NAN, fail);
    check_special<E>("exp", f, 0, 1, fail);
    check_special<E>("exp", f, -0.0, 1, fail);
    check_special<E>("exp", f, 1e30, INFINITY, fail);
    check_special<E>("exp", f, -1e30, 0, fail);
  }
  check_special<E>("exp2", f_exp2, high, INFINITY, fail);
  check_special<E>("exp2", f_exp2, low, FloatTraits<E>::smallest_normal, fail);
  for (int n = static_cast<int>(low); n < high; ++n) check_special<E>("exp2", f_exp2, n, ldexp(1, n), fail);
  for (int n = static_cast<int>(low) - 20; n < high; ++n) check_special<E>("log2", f_log2, ldexp(1, n), n, fail);
  check_special<E>("log2", f_log2, 0, -INFINITY, fail);
  check_special<E>("log2", f_log2, -0.0, -INFINITY, fail);
  check_special<E>("log2", f_log2, INFINITY, INFINITY, fail);
  for (double x : {-1.0, -static_cast<double>(INFINITY), static_cast<double>(NAN)})
    check_special<E>("log2", f_log2, x, NAN, fail);
  check_special<E>("log2_1p", f_log2_1p, 0, 0, fail);
  check_special<E>("log2_1p", f_log2_1p, 1, 1, fail);
  check_special<E>("log2_1p", f_log2_1p, NAN, NAN, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, INFINITY, 0, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, -INFINITY, -INFINITY, fail);
  check_special<E>("log_sigmoid", f_log_sigmoid, NAN, NAN, fail);
  for (Unary<E> f : {f_tanh, f_tanh_too}) {
    check_special<E>("tanh", f, INFINITY, 1, fail);
    check_special<E>("tanh", f, -INFINITY, -1, fail);
    check_special<E>("tanh", f, NAN, NAN, fail);
    check_special<E>("tanh", f, 0, 0, fail);
  }
  check_special<E>("derivative of tanh", f_tanh_slope, INFINITY, 0, fail);
  check_special<E>("derivative of tanh", f_tanh_slope, -INFINITY, 0, fail);
  check_special<E>("derivative of tanh", f_tanh_slope, NAN, NAN, fail);
  check_special<E>("derivative of tanh", f_tanh_slope, 0, 1, fail);
}

}  // namespace

int test_math() {
  Failures fail;
  check_math<float>(fail);
  check_math<double>(fail);
  return fail.count;
}

double time_exp2(int64_t n) {
  constexpr int64_t kBlock = 4096;  // in L1
  AlignedBuffer<float> x(kBlock);
  for (int64_t i = 0; i < kBlock; ++i) x.data()[i] = -0.001f * static_cast<float>(i);
  const double start = thread_time();
  for (int64_t done = 0; done < n; done += kBlock)
    for (int64_t i = 0; i < kBlock; i += kLanes<float>) store(x.data() + i, -exp2(load(x.data() + i)));
  return thread_time() - start;
}

}  // namespace MMK_ISA
}  // namespace mmk
