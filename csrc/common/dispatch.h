// Runtime selection of the CPU kernels' instruction set.
//
// Every `*_cpu.cpp` is compiled once per instruction set, with MMK_ISA naming it and all its code in
// `namespace mmk { namespace MMK_ISA { ... } }`. A family declares its kernels as a struct of function pointers:
//
//   foo.h        struct FooKernels { void (*forward)(const FooArgs&); };
//                MMK_DECLARE_KERNELS(FooKernels, foo)
//   foo_cpu.cpp  MMK_DEFINE_KERNELS(FooKernels, foo) = {&mmk::MMK_ISA::forward};      (inside namespace mmk)
//   a caller     mmk::foo_kernels().forward(args);
//
// The build chooses the sets (cmake/isa.cmake): MMK_HAVE_<SET> is defined for each except the baseline.
#pragma once

#define MMK_CONCAT_(a, b) a##b
#define MMK_CONCAT(a, b) MMK_CONCAT_(a, b)

#ifdef MMK_HAVE_AVX2
#define MMK_IF_AVX2(...) __VA_ARGS__
#else
#define MMK_IF_AVX2(...)
#endif
#ifdef MMK_HAVE_AVX512
#define MMK_IF_AVX512(...) __VA_ARGS__
#else
#define MMK_IF_AVX512(...)
#endif
#ifdef MMK_HAVE_AVX512BF16
#define MMK_IF_AVX512BF16(...) __VA_ARGS__
#else
#define MMK_IF_AVX512BF16(...)
#endif

namespace mmk {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// The set in use: the fastest one compiled that this CPU and its OS support (avx512bf16 only where its dot product
// beats float FMA), unless the environment variable MMKERNELS_CPU_ISA (for tests) names another. Throws
// std::invalid_argument, listing the choices, if that set is unknown, not compiled or not supported here.
Isa active_isa();
const char* cpu_isa();

// Names of the compiled sets, narrowest first, ending in nullptr; and whether this machine can run one.
// MMKERNELS_CPU_HIDE (for tests) names a set that is treated as unsupported, with all wider ones; std::invalid_argument
// for an unknown name. This emulates the kernel and test selection of an older processor.
const char* const* compiled_isas();
bool isa_supported(const char* name);

}  // namespace mmk

#define MMK_DECLARE_KERNELS(Struct, family)                                        \
  extern const Struct family##_baseline;                                           \
  MMK_IF_AVX2(extern const Struct family##_avx2;)                                  \
  MMK_IF_AVX512(extern const Struct family##_avx512;)                              \
  MMK_IF_AVX512BF16(extern const Struct family##_avx512bf16;)                      \
  static inline __attribute__((unused)) const Struct& family##_kernels() {         \
    switch (::mmk::active_isa()) {                                                 \
      MMK_IF_AVX512BF16(case ::mmk::Isa::avx512bf16 : return family##_avx512bf16;) \
      MMK_IF_AVX512(case ::mmk::Isa::avx512 : return family##_avx512;)             \
      MMK_IF_AVX2(case ::mmk::Isa::avx2 : return family##_avx2;)                   \
      default:                                                                     \
        return family##_baseline;                                                  \
    }                                                                              \
  }

#define MMK_DEFINE_KERNELS(Struct, family) extern const Struct MMK_CONCAT(family##_, MMK_ISA)
