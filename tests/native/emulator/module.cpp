// The CUDA launchers of csrc/module_cuda.cpp over emulated kernels, and the emulator's own controls.
#include <pybind11/pybind11.h>

#include "emulator.h"

namespace py = pybind11;

void mmk_bind_cuda(py::module_& m);

PYBIND11_MODULE(mmk_emulated, m) {
  mmk_bind_cuda(m);
  m.def("set_seed", [](uint64_t seed) { emulator::settings.seed = seed; });
  m.def("set_multiprocessors", [](int count) { emulator::settings.multiprocessors = count; });
  m.def("set_capability", [](int capability) { emulator::settings.capability = capability; });
  m.def("reset_counts", [] { emulator::counts = {}; });
  m.def("counts", [] {
    py::dict counts;
    counts["launches"] = emulator::counts.launches;
    counts["blocks"] = emulator::counts.blocks;
    counts["barriers"] = emulator::counts.barriers;
    counts["matrix_products"] = emulator::counts.matrix_products;
    counts["async_copies"] = emulator::counts.async_copies;
    counts["warpgroup_products"] = emulator::counts.warpgroup_products;
    counts["tma_loads"] = emulator::counts.tma_loads;
    counts["tma_stores"] = emulator::counts.tma_stores;
    return counts;
  });
  m.def("fence", [](size_t bytes) { return reinterpret_cast<uintptr_t>(emulator::fence(bytes)); });
  m.def("unfence", [](uintptr_t address, size_t bytes) { emulator::unfence(reinterpret_cast<void*>(address), bytes); });
}
