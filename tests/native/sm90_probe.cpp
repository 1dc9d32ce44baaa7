// The probe kernel, emulated, for tests/test_emulator.py.
#include "sm90_probe.h"

#include <pybind11/pybind11.h>

#include <utility>

#include "common/cuda/tensor_map.h"

namespace {

using namespace mmk::cuda;

using Kernel = void (*)(ProbeParams);

template <int... kMistake>
Kernel kernel_of(int mistake, std::integer_sequence<int, kMistake...>) {
  constexpr Kernel kKernels[] = {sm90_probe_kernel<kMistake>...};
  return kKernels[mistake];
}

// a, b [64, 256], v, out [64, 64]: addresses of contiguous bfloat16 rows.
void probe(int mistake, uint64_t seed, uintptr_t a, uintptr_t b, uintptr_t v, uintptr_t out) {
  const auto map = [](uintptr_t address, int columns) {
    return tensor_map(mmk::DType::bf16,
                      {2, reinterpret_cast<void*>(address), {columns, 64, 1}, {1, columns, 0}, {64, 64, 1}});
  };
  const TensorMap to =
      tensor_map(mmk::DType::bf16, {3, reinterpret_cast<void*>(out), {64, 64, 1}, {1, 64, 64 * 64}, {64, 64, 1}});
  emulator::settings.seed = seed;
  emulator::settings.capability = 90;
  const ProbeParams params{map(a, 256), map(b, 256), map(v, 64), to};
  launch("sm90_probe", kernel_of(mistake, std::make_integer_sequence<int, kMistakes>{}), dim3(1), 3 * kWarpgroup,
         ProbeSmem::bytes, nullptr, params);
}

}  // namespace

PYBIND11_MODULE(sm90_probe, m) {
  m.def("probe", &probe);
  m.attr("mistakes") = static_cast<int>(kMistakes);
}
