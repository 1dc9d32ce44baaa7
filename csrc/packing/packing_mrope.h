// The M-RoPE position of one token, for CPU and GPU; see packing.h.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mmk {
namespace {

// How many of the non-decreasing values [n] are below x, or with `or_equal` at most x.
MMK_HOST_DEVICE int64_t count_below(const int64_t* values, int64_t n, int64_t x, bool or_equal) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (values[middle] < x || (or_equal && values[middle] == x)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct MropeSpans {
  const int64_t* cu_seqlens;  // [boundaries]
  int64_t boundaries;
  const int64_t* starts;  // [spans]
  int64_t spans;
  const int64_t* extent;  // [spans, 3]
  const int64_t* gained;  // [spans + 1]

  // Writes axis k of token t to out[k * stride].
  MMK_HOST_DEVICE void place(int64_t t, int64_t* out, int64_t stride) const {
    const int64_t begin = cu_seqlens[count_below(cu_seqlens, boundaries, t, true) - 1];
    const int64_t n = count_below(starts, spans, t, true);  // number of spans that begin at or before the token
    int64_t base = t - begin - gained[count_below(starts, spans, begin, false)] + gained[n];
    int64_t frame = 0, y = 0, x = 0;
    if (n > 0) {
      const int64_t* size = extent + 3 * (n - 1);
      const int64_t inside = t - starts[n - 1];
      if (inside < size[0] * size[1] * size[2]) {
        base += gained[n - 1] - gained[n] - inside;
        frame = inside / (size[1] * size[2]), y = inside / size[2] % size[1], x = inside % size[2];
      }
    }
    out[0] = base + frame, out[stride] = base + y, out[2 * stride] = base + x;
  }
};

}  // namespace
}  // namespace mmk
