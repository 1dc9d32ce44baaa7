// The emulator's csrc/common/cuda/tensor_map.h: rejects what the driver rejects.
#pragma once

#include <stdexcept>

#include "common/cuda/box.h"
#include "common/cuda/launch.h"
#include "common/cuda/sm90_atoms.h"

namespace mmk::cuda {

inline TensorMap tensor_map(DType dtype, const Box& box) {
  const auto want = [](bool condition, const char* what) {
    if (!condition) throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  want(dtype == DType::bf16 || dtype == DType::f16, "dtype");
  want(reinterpret_cast<uintptr_t>(box.data) % 16 == 0, "address off 16 bytes");
  want(box.rank >= 2 && box.rank <= 3, "rank");
  want(box.stride[0] == 1 && box.box[0] <= 64, "the innermost dimension is one swizzled row");
  TensorMap map{{box.rank, static_cast<unsigned char*>(const_cast<void*>(box.data)), {1, 1, 1}, {1, 0, 0}, {1, 1, 1}}};
  for (int i = 0; i < box.rank; ++i) {
    want(box.size[i] >= 1 && box.size[i] <= 1ll << 32, "size");
    want(box.box[i] >= 1 && box.box[i] <= 256, "box");
    want(i == 0 || (box.stride[i] * 2 % 16 == 0 && box.stride[i] > 0 && box.stride[i] * 2 < 1ll << 40), "stride");
    map.box.size[i] = box.size[i];
    map.box.stride[i] = box.stride[i];
    map.box.box[i] = box.box[i];
  }
  return map;
}

}  // namespace mmk::cuda
