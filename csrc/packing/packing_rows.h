// Copies rows of bytes: any row stride in, streaming stores for large outputs.
#pragma once

#include "common/simd/vec.h"
#include "common/tensor.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Larger outputs do not stay in the caches, so stores bypass them, which saves reading each line before writing it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

MMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

MMK_INLINE int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

#if defined(__x86_64__)
using Line = Vec<int64_t>;

MMK_INLINE void stream_line(char* to, Line v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#endif
}
#endif

// Writes rows of one width; decides once whether they can and should bypass the caches.
class RowWriter {
 public:
  RowWriter(void* out, int64_t rows, int64_t row_bytes) : out_(static_cast<char*>(out)), bytes_(row_bytes) {
    const bool aligned = (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes)) % 64 == 0;
#if defined(__x86_64__)
    streams_ = aligned && rows * row_bytes >= kStreamBytes;
#else
    (void)aligned;
    (void)rows;
#endif
  }

  // Writes row i from the bytes at `from`, or zeros if null. `next`, if any, is a row that a later call will read.
  MMK_INLINE void write(int64_t i, const void* from, const void* next = nullptr) const {
    char* to = out_ + i * bytes_;
#if defined(__x86_64__)
    if (streams_) {
      const char *source = static_cast<const char*>(from), *ahead = static_cast<const char*>(next);
      for (int64_t b = 0; b < bytes_; b += kVecBytes) {
        if (ahead != nullptr && b % 64 == 0) __builtin_prefetch(ahead + b);
        stream_line(to + b, source != nullptr ? load_as<int64_t>(source + b) : Line{});
      }
      return;
    }
#endif
    if (next != nullptr) __builtin_prefetch(next);
    if (from != nullptr) {
      __builtin_memcpy(to, from, static_cast<size_t>(bytes_));
    } else {
      __builtin_memset(to, 0, static_cast<size_t>(bytes_));
    }
  }

  // Call in each thread after its last row.
  MMK_INLINE void finish() const {
#if defined(__x86_64__)
    if (streams_) _mm_sfence();
#endif
  }

 private:
  char* out_;
  int64_t bytes_;
  bool streams_ = false;
};

// Rows of a tensor as bytes: any row stride, contiguous columns.
struct RowReader {
  const char* data = nullptr;
  int64_t stride_bytes = 0;

  RowReader() = default;
  explicit RowReader(const Tensor& x)
      : data(static_cast<const char*>(x.data)), stride_bytes(x.stride[0] * element_bytes(x.dtype)) {}
  MMK_INLINE const void* row(int64_t i) const { return data + i * stride_bytes; }
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
