// A TMA transfer described without driver types; tensor_map.h turns it into a CUtensorMap.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace mmk::cuda {

// Whether *_sm90_*.cu are built: 90a is among the architectures.
#ifdef MMK_HAVE_SM90
constexpr bool kHaveSm90 = true;
#else
constexpr bool kHaveSm90 = false;
#endif

// A tensor of 16-bit elements whose innermost dimension is contiguous, and the box that one load or store moves. The
// box's innermost dimension is 64 elements, one swizzled row.
struct Box {
  static constexpr int kMaxRank = 3;
  int rank;
  const void* data;          // a multiple of 16 bytes
  int64_t size[kMaxRank];    // elements, the innermost first
  int64_t stride[kMaxRank];  // elements; [0] is 1, the others are multiples of 8
  int box[kMaxRank];         // at most 256
};

// Whether TMA supports a tensor's strides.
inline bool tma_serves(const Tensor& x) {
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return false;
  for (int i = 0; i + 1 < x.ndim; ++i) {
    // The driver validates strides even of dimensions of size 1, and rejects overlapping rows.
    if (x.stride[i] < x.size[x.ndim - 1] || x.stride[i] * 2 % 16 != 0 || x.stride[i] * 2 >= 1ll << 40) return false;
  }
  return x.stride[x.ndim - 1] == 1 || x.size[x.ndim - 1] == 1;
}

}  // namespace mmk::cuda
