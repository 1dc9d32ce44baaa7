// The emulator's csrc/common/cuda/launch.h: the same names; a launch runs synchronously.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "common/tensor.h"

namespace mmk::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

inline int compute_capability() { return emulator::settings.capability; }
inline int num_multiprocessors() { return emulator::settings.multiprocessors; }

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, unsigned block, size_t shared_bytes, void*,
            const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run(name, grid, block, shared_bytes, [&] { kernel(static_cast<std::remove_cv_t<Params>>(args)...); });
}

inline void fill_zero(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }

}  // namespace mmk::cuda
