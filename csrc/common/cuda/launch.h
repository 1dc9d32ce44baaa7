// Host side of CUDA launchers: device, shared memory, launch, and errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "common/tensor.h"

namespace mmk::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear a non-sticky error, so that a later unrelated check does not report it
  std::ostringstream message;
  message << "mmkernels: " << what << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

// Makes a tensor's device current for a scope. No effect for an empty tensor.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) {
    if (tensor.data == nullptr) return;
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, tensor.data), "device of a tensor");
    check(cudaGetDevice(&previous_), "current device");
    if (attributes.device == previous_) return;
    check(cudaSetDevice(attributes.device), "choose device");
    restore_ = true;
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

// 90 for 9.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

constexpr size_t kDefaultSharedMemory = 48 * 1024;

// Opts in to more than 48 KB; if the device lacks it, the error gives both sizes.
inline void reserve_shared_memory(const char* name, const void* kernel, size_t bytes) {
  if (bytes <= kDefaultSharedMemory) return;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (bytes > static_cast<size_t>(limit)) {
    std::ostringstream message;
    message << "mmkernels: " << name << " needs " << bytes
            << " bytes of shared memory per block, but this device allows " << limit;
    throw std::runtime_error(message.str());
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Launches kernel(args...) on a stream. Arguments are converted to the kernel's parameter types. An empty grid launches
// nothing.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, unsigned block, size_t shared_bytes, void* stream,
            const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto* function = reinterpret_cast<const void*>(kernel);
  reserve_shared_memory(name, function, shared_bytes);
  const auto run = [&](std::remove_cv_t<Params>... params) {
    void* pointers[] = {static_cast<void*>(&params)...};
    return cudaLaunchKernel(function, grid, dim3(block), pointers, shared_bytes, static_cast<cudaStream_t>(stream));
  };
  check(run(static_cast<std::remove_cv_t<Params>>(args)...), name);
}

inline void fill_zero(void* data, size_t bytes, void* stream) {
  if (bytes > 0) check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "fill with zeros");
}

}  // namespace mmk::cuda
