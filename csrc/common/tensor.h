// The core's non-owning view of a tensor: pointer, dtype, sizes and strides (in elements).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmk {

struct Tensor {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;  // 0 sizes with data == nullptr: "not given"
  int64_t size[kMaxDims] = {0, 0, 0, 0};
  int64_t stride[kMaxDims] = {0, 0, 0, 0};

  bool given() const { return ndim > 0; }

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace mmk
