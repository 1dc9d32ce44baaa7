// Host side of every CUDA launcher: device, shared memory, launch, and errors that name the kernel.
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
  cudaGetLastError();  // a sticky-less error must not surface in someone else's check
  std::ostringstream message;
  message << "mmkernels: " << what << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

// Makes the device that holds a tensor current for a scope. An empty tensor holds nothing and changes nothing.
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

// Above 48 KB a kernel has to ask; a device that cannot give it is named in bytes.
inline void reserve_shared_memory(const char* name, const void* kernel, size_t bytes) {
  if (bytes <= kDefaultSharedMemory) return;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (bytes > static_cast<size_t>(limit)) {
    std::ostringstream message;
    message << "mmkernels: " << name << " needs " << bytes << " bytes of shared memory per block, this device gives "
            << limit;
    throw std::runtime_error(message.str());
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Launches kernel(args...) on a stream. Each argument is converted to the kernel's own parameter type. A grid with a
// zero in it is no work.
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
