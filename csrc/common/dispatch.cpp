#include "common/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mmk {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};
constexpr const char* kCompiled[] = {
    "baseline", MMK_IF_AVX2("avx2", ) MMK_IF_AVX512("avx512", ) MMK_IF_AVX512BF16("avx512bf16", ) nullptr};

// Returns the index of `name`, or -1 if there is no such set.
int find_isa(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(kNames[i], name) == 0) return i;
  return -1;
}

// MMKERNELS_CPU_HIDE: the narrowest hidden set. Names of sets that are not compiled are accepted, so that one test
// covers every build. The baseline, which every processor has, cannot be hidden.
bool hidden(Isa isa) {
  const char* from = std::getenv("MMKERNELS_CPU_HIDE");
  if (from == nullptr || *from == '\0') return false;
  const int first = find_isa(from);
  if (first <= 0)
    throw std::invalid_argument(std::string("MMKERNELS_CPU_HIDE: expected one of {avx2, avx512, avx512bf16}, got \"") +
                                from + "\"");
  return static_cast<int>(isa) >= first;
}

// __builtin_cpu_supports also checks (XGETBV) that the OS saves the registers.
bool cpu_has(Isa isa) {
  if (hidden(isa)) return false;
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2: {
      // GCC 10 does not support the name "f16c": read leaf 1, ECX bit 29.
      unsigned eax, ebx, ecx, edx;
      const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
      return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16:
      return cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

// On Intel up to Emerald Rapids vdpbf16ps does half the flops of two float FMA ports (measured: 87 vs 189 GFLOP/s per
// core), so widening bf16 to float is faster; on AMD it does twice the flops of FMA.
bool bf16_dot_is_fast() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa choose_isa() {
  std::string usable;
  Isa widest = Isa::baseline;
  for (const char* const* name = kCompiled; *name != nullptr; ++name) {
    if (!isa_supported(*name)) continue;
    const Isa isa = static_cast<Isa>(find_isa(*name));
    if (isa != Isa::avx512bf16 || bf16_dot_is_fast()) widest = isa;
    usable += usable.empty() ? "" : ", ";
    usable += *name;
  }
  const char* wanted = std::getenv("MMKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest;
  if (!isa_supported(wanted))
    throw std::invalid_argument("MMKERNELS_CPU_ISA: expected one of {" + usable + "}, got \"" + wanted + "\"");
  return static_cast<Isa>(find_isa(wanted));
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();  // a throwing initialiser is retried, so every call raises
  return isa;
}

const char* cpu_isa() { return kNames[static_cast<int>(active_isa())]; }

const char* const* compiled_isas() { return kCompiled; }

bool isa_supported(const char* name) {
  for (const char* const* compiled = kCompiled; *compiled != nullptr; ++compiled)
    if (std::strcmp(*compiled, name) == 0) return cpu_has(static_cast<Isa>(find_isa(name)));
  return false;
}

}  // namespace mmk
