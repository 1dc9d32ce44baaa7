// Shared by the test files that are compiled once per instruction set. Like every *_cpu.cpp file they use no std::
// container or function, so that test_simd.py can also assert that their objects leak no symbol out of their namespace.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "common/simd/gemm.h"
#include "simd_test.h"

namespace mmk {
namespace MMK_ISA {

struct Failures {
  int count = 0;
  bool operator()(bool ok) {
    if (!ok) ++count;
    return !ok && count <= 5;  // true: print this one
  }
};

// An array that ends at an unmapped page: an access past its end always crashes. Starts as all-ones bytes, which are
// NaN in every floating-point type.
template <class T>
struct Guarded {
  explicit Guarded(int64_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    used = (static_cast<size_t>(count) * sizeof(T) + page - 1) / page * page;
    base = static_cast<char*>(mmap(nullptr, used + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + used, page, PROT_NONE) != 0) abort();
    memset(base, 0xff, used);
    data = reinterpret_cast<T*>(base + used) - count;
    mapped = used + page;
  }
  ~Guarded() { munmap(base, mapped); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  // Whether everything before the array is unchanged.
  bool front_untouched() const {
    for (const char* p = base; p < reinterpret_cast<const char*>(data); ++p)
      if (*p != '\xff') return false;
    return true;
  }
  char* base;
  size_t used, mapped;
  T* data;
};

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  double uniform(double low, double high) { return low + (high - low) * (bits() * 0x1p-32); }
};

// Scalar references in double arithmetic, without bit tricks. `bits` and `bias` describe the 16-bit format.
inline double decode(uint16_t h, int mantissa_bits, int bias) {
  const int exponent = (h & 0x7fff) >> mantissa_bits, mantissa = h & ((1 << mantissa_bits) - 1);
  const int all_ones = (1 << (15 - mantissa_bits)) - 1;
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == all_ones) return mantissa ? static_cast<double>(NAN) : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

inline uint16_t encode(double x, int mantissa_bits, int bias) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const int infinity = ((1 << (15 - mantissa_bits)) - 1) << mantissa_bits;
  const double a = fabs(x);
  if (isinf(a)) return static_cast<uint16_t>(sign | infinity);
  int exponent = 1 - bias;
  if (a > 0) {
    int e;
    frexp(a, &e);
    if (e - 1 > exponent) exponent = e - 1;
  }
  const double steps = nearbyint(ldexp(a, mantissa_bits - exponent));  // to nearest even
  const double code = steps + ldexp(exponent + bias - 1, mantissa_bits);
  return static_cast<uint16_t>(sign | (code > infinity ? infinity : static_cast<int>(code)));
}

inline double decode(bf16 h) { return decode(h.bits, 7, 127); }
inline double decode(f16 h) { return decode(h.bits, 10, 15); }
inline double decode(float x) { return x; }
inline double decode(double x) { return x; }
inline void encode(double x, bf16& h) { h.bits = encode(x, 7, 127); }
inline void encode(double x, f16& h) { h.bits = encode(x, 10, 15); }
inline void encode(double x, float& y) { y = static_cast<float>(x); }
inline void encode(double x, double& y) { y = x; }

inline bool same(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }

int test_gemm();  // simd_test_gemm_cpu.cpp
double time_gemm(DType dtype, GemmShape problem, GemmShape tile, bool with_packing, int threads);
int test_math();  // simd_test_math_cpu.cpp
double time_exp2(int64_t n);

// This thread's CPU time: other programs on the machine do not count, so a busy machine can be used.
inline double thread_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace MMK_ISA
}  // namespace mmk
