// Packing on CPU: rows are moved whole, sums are taken row by row so that memory is read in order.
//
// Sums: blocks of kBlockRows rows are added plainly, and blocks into the total with the rounding errors carried along
// (Neumaier), so the error does not grow with the number of rows. Segments are cut into chunks of kChunkRows rows;
// neither the cuts nor the order of any addition depends on the number of threads.
#include "packing/packing.h"

#include <type_traits>

#include "common/parallel.h"
#include "common/simd/vec.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kChunkRows = 1024;
// Outputs beyond this leave the caches anyway: stores then bypass them and save reading each line before writing it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls fn with a null T* for the element type.
template <class F>
void with_type(DType dtype, F fn) {
  switch (dtype) {
    case DType::f32:
      return fn(static_cast<float*>(nullptr));
    case DType::bf16:
      return fn(static_cast<bf16*>(nullptr));
    case DType::f16:
      return fn(static_cast<f16*>(nullptr));
    case DType::f64:
      return fn(static_cast<double*>(nullptr));
    default:
      return;
  }
}

int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---- rows of bytes --------------------------------------------------------------------------------------------------

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

  // Row i = the bytes at `from`, or zeros where `from` is null.
  MMK_INLINE void write(int64_t i, const void* from) const {
    char* to = out_ + i * bytes_;
#if defined(__x86_64__)
    if (streams_) {
      const char* source = static_cast<const char*>(from);
      for (int64_t b = 0; b < bytes_; b += kVecBytes)
        stream_line(to + b, source != nullptr ? load_as<int64_t>(source + b) : Line{});
      return;
    }
#endif
    if (from != nullptr) {
      __builtin_memcpy(to, from, static_cast<size_t>(bytes_));
    } else {
      __builtin_memset(to, 0, static_cast<size_t>(bytes_));
    }
  }

  // To be called by each thread after its last row.
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
  const char* data;
  int64_t stride_bytes;

  explicit RowReader(const Tensor& x)
      : data(static_cast<const char*>(x.data)), stride_bytes(x.stride[0] * element_bytes(x.dtype)) {}
  MMK_INLINE const void* row(int64_t i) const { return data + i * stride_bytes; }
};

void gather_fwd(const Tensor& source, const Tensor& index, const Tensor& out, int num_threads) {
  const int64_t row_bytes = source.size[1] * element_bytes(source.dtype);
  const int64_t* at = index.ptr<const int64_t>();
  const RowReader from(source);
  const RowWriter to(out.data, index.size[0], row_bytes);
  parallel_chunks(index.size[0], num_threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      // The rows are scattered, so the hardware cannot foresee where the next one begins.
      if (t + 1 < end && at[t + 1] >= 0) __builtin_prefetch(from.row(at[t + 1]));
      to.write(t, at[t] >= 0 ? from.row(at[t]) : nullptr);
    }
    to.finish();
  });
}

// ---- sums of rows ---------------------------------------------------------------------------------------------------

// total + carry [width] += from [width], exactly up to the rounding of the carry.
template <class C>
MMK_INLINE void add_carrying(const C* from, int64_t width, C* total, C* carry) {
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    const auto old = load_n(total + e, n), more = load_n(from + e, n);
    const auto sum = old + more, rounded = sum - old;
    store_n(carry + e, load_n(carry + e, n) + ((old - (sum - rounded)) + (more - rounded)), n);
    store_n(total + e, sum, n);
  }
}

// total [width] += carry [width]; an infinite total, whose carry is a NaN, stays what it is.
template <class C>
MMK_INLINE void settle_carry(const C* carry, int64_t width, C* total) {
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    const auto sum = load_n(total + e, n), rest = load_n(carry + e, n);
    store_n(total + e, rest == rest ? sum + rest : sum, n);
  }
}

// total [width] = sum of row(0) ... row(count - 1) in the compute type. scratch holds 2 * width.
template <class T, class Row>
MMK_INLINE void sum_rows(int64_t count, int64_t width, Row row, ComputeOf<T>* scratch, ComputeOf<T>* total) {
  using C = ComputeOf<T>;
  constexpr int kL = kLanes<C>;
  C *block = scratch, *carry = scratch + width;
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(C);
  __builtin_memset(total, 0, row_bytes);
  __builtin_memset(carry, 0, row_bytes);
  for (int64_t b = 0; b < count; b += kBlockRows) {
    const int64_t end = least(count, b + kBlockRows);
    __builtin_memset(block, 0, row_bytes);
    int64_t r = b;
    for (; r + 4 <= end; r += 4) {
      const T *x0 = row(r), *x1 = row(r + 1), *x2 = row(r + 2), *x3 = row(r + 3);
      int64_t e = 0;
      for (; e + kL <= width; e += kL) {
        const auto four = (load(x0 + e) + load(x1 + e)) + (load(x2 + e) + load(x3 + e));
        store(block + e, load(block + e) + four);
      }
      if (const int64_t n = width - e; n > 0) {
        const auto four = (load_n(x0 + e, n) + load_n(x1 + e, n)) + (load_n(x2 + e, n) + load_n(x3 + e, n));
        store_n(block + e, load_n(block + e, n) + four, n);
      }
    }
    for (; r < end; ++r) {
      const T* x = row(r);
      for (int64_t e = 0; e < width; e += kL) {
        const int64_t n = least(kL, width - e);
        store_n(block + e, load_n(block + e, n) + load_n(x + e, n), n);
      }
    }
    add_carrying(block, width, total, carry);
  }
  settle_carry(carry, width, total);
}

// to [width] = from [width] / divisor, rounded to T.
template <class T>
MMK_INLINE void round_row(const ComputeOf<T>* from, ComputeOf<T> divisor, int64_t width, T* to) {
  using C = ComputeOf<T>;
  for (int64_t e = 0; e < width; e += kLanes<C>) {
    const int64_t n = least(kLanes<C>, width - e);
    store_n(to + e, load_n(from + e, n) / splat(divisor), n);
  }
}

template <class T>
void scatter(const Tensor& packed, const Tensor& index, const Tensor& out, int num_threads) {
  using C = ComputeOf<T>;
  const int64_t rows_in = index.size[0], R = out.size[0], E = out.size[1];
  const int64_t* at = index.ptr<const int64_t>();
  // Counting sort of the packed rows by the row they add to; entries of -1 are left out. While the entries are placed,
  // begin[r + 1] moves from the first entry of row r past its last, so that begin[r] ends up where row r begins.
  AlignedBuffer<int64_t> begin_buffer(R + 2), order_buffer(rows_in);
  int64_t *begin = begin_buffer.data(), *order = order_buffer.data();
  __builtin_memset(begin, 0, static_cast<size_t>(R + 2) * sizeof(int64_t));
  for (int64_t t = 0; t < rows_in; ++t)
    if (at[t] >= 0) ++begin[at[t] + 2];
  for (int64_t r = 2; r < R + 2; ++r) begin[r] += begin[r - 1];
  for (int64_t t = 0; t < rows_in; ++t)
    if (at[t] >= 0) order[begin[at[t] + 1]++] = t;

  const RowReader from(packed);
  const RowWriter to(out.data, R, E * static_cast<int64_t>(sizeof(T)));
  constexpr int64_t kTaskRows = 32;
  AlignedBuffer<C> scratch(usable_threads((R + kTaskRows - 1) / kTaskRows, num_threads) * 4 * E);
  parallel_for((R + kTaskRows - 1) / kTaskRows, num_threads, [&](int64_t task, int thread) {
    C *mine = scratch.data() + thread * 4 * E, *total = mine + 2 * E;
    T* rounded = reinterpret_cast<T*>(mine + 3 * E);
    for (int64_t r = task * kTaskRows; r < least(R, (task + 1) * kTaskRows); ++r) {
      const int64_t *first = order + begin[r], count = begin[r + 1] - begin[r];
      if (count <= 1) {
        to.write(r, count == 1 ? from.row(first[0]) : nullptr);
        continue;
      }
      const auto row = [&](int64_t k) { return static_cast<const T*>(from.row(first[k])); };
      sum_rows<T>(count, E, row, mine, total);
      round_row(total, C(1), E, rounded);
      to.write(r, rounded);
    }
    to.finish();
  });
}

void scatter_fwd(const Tensor& packed, const Tensor& index, const Tensor& out, int num_threads) {
  with_type(packed.dtype,
            [&](auto* t) { scatter<std::remove_pointer_t<decltype(t)>>(packed, index, out, num_threads); });
}

// ---- pooling --------------------------------------------------------------------------------------------------------

// The rows of all segments, cut into chunks of at most kChunkRows; an empty segment is one empty chunk. Rows past the
// last segment follow as chunks of segment S.
class Chunks {
 public:
  struct Chunk {
    int64_t segment, begin, end;
    int64_t slot;  // where its partial result goes, or -1: it is its segment's only chunk
  };

  Chunks(const Tensor& cu_seqlens, int64_t num_rows)
      : cu_(cu_seqlens.ptr<const int32_t>()),
        segments_(cu_seqlens.size[0] - 1),
        rows_(num_rows),
        first_(segments_ + 2),
        slot_(segments_ + 2) {
    first_.data()[0] = slot_.data()[0] = 0;
    for (int64_t s = 0; s <= segments_; ++s) {
      const int64_t cut = (end(s) - cu_[s] + kChunkRows - 1) / kChunkRows;
      first_.data()[s + 1] = first(s) + (s < segments_ ? most(1, cut) : cut);
      slot_.data()[s + 1] = slot(s) + (count(s) > 1 ? count(s) : 0);
    }
  }

  int64_t segments() const { return segments_; }
  int64_t first(int64_t s) const { return first_.data()[s]; }  // the first chunk of a segment
  int64_t count(int64_t s) const { return first(s + 1) - first(s); }
  int64_t slot(int64_t s) const { return slot_.data()[s]; }  // the first partial result of a segment of several chunks
  int64_t length(int64_t s) const { return end(s) - cu_[s]; }

  // Calls fn(chunk, thread) for the chunks of segments [0, segments), on several threads.
  template <class F>
  void for_each(int64_t segments, int num_threads, F fn) const {
    const int64_t n = first(segments), tasks = (n + kTaskChunks - 1) / kTaskChunks;
    parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
      const int64_t stop = least(n, (task + 1) * kTaskChunks);
      int64_t s = segment_of(task * kTaskChunks);
      for (int64_t c = task * kTaskChunks; c < stop; ++c) {
        while (c >= first(s + 1)) ++s;
        const int64_t begin = cu_[s] + (c - first(s)) * kChunkRows;
        const int64_t place = count(s) > 1 ? slot(s) + c - first(s) : -1;
        fn(Chunk{s, begin, least(end(s), begin + kChunkRows), place}, thread);
      }
    });
  }
  static int threads(int64_t chunks, int num_threads) {
    return usable_threads((chunks + kTaskChunks - 1) / kTaskChunks, num_threads);
  }

 private:
  static constexpr int64_t kTaskChunks = 4;

  int64_t end(int64_t s) const { return s < segments_ ? cu_[s + 1] : rows_; }

  // The last segment whose first chunk is at most c.
  int64_t segment_of(int64_t c) const {
    int64_t low = 0, high = segments_ + 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first(middle) <= c ? low : high) = middle;
    }
    return low;
  }

  const int32_t* cu_;
  int64_t segments_, rows_;
  AlignedBuffer<int64_t> first_, slot_;  // [segments + 2]
};

// The running maximum of a chunk and the row that holds it, one lane per column.
template <class C>
using ArgOf = typename IntOf<C>::type;

// best, arg [width] take in a row of values whose columns come from rows `from(e)`: a larger value or the first NaN
// wins.
template <class C, class Value, class From>
MMK_INLINE void take_max(int64_t width, Value value, From from, C* best, ArgOf<C>* arg) {
  constexpr int kL = kLanes<C>;
  for (int64_t e = 0; e < width; e += kL) {
    const auto v = value(e);
    const auto old = load(best + e);
    const auto wins = (v > old) | ((v != v) & (old == old));
    store(best + e, wins ? v : old);
    const auto old_arg = load_as<ArgOf<C>>(arg + e), new_arg = wins ? from(e) : old_arg;
    __builtin_memcpy(arg + e, &new_arg, sizeof new_arg);
  }
}

template <class T>
void pool_max(const Tensor& x, const Chunks& chunks, const Tensor& out, const Tensor& argmax, int num_threads) {
  using C = ComputeOf<T>;
  constexpr int kL = kLanes<C>;
  const int64_t S = chunks.segments(), E = x.size[1], width = (E + kL - 1) / kL * kL;
  const RowReader from(x);
  // Rows of maxima and winners, padded to whole vectors: one per partial result, then one per thread.
  const int64_t slots = chunks.slot(S), buffer_rows = slots + Chunks::threads(chunks.first(S), num_threads);
  AlignedBuffer<C> best_buffer(buffer_rows * width);
  AlignedBuffer<ArgOf<C>> arg_buffer(buffer_rows * width);
  const auto finish = [&](int64_t s, const C* best, const ArgOf<C>* arg) {
    round_row(best, C(1), E, out.ptr<T>() + s * E);
    for (int64_t e = 0; e < E; ++e) argmax.ptr<int32_t>()[s * E + e] = static_cast<int32_t>(arg[e]);
  };
  chunks.for_each(S, num_threads, [&](const Chunks::Chunk& chunk, int thread) {
    const int64_t at = chunk.slot >= 0 ? chunk.slot : slots + thread;
    C* best = best_buffer.data() + at * width;
    ArgOf<C>* arg = arg_buffer.data() + at * width;
    const bool empty = chunk.begin == chunk.end;
    for (int64_t e = 0; e < width; e += kL) {
      const auto row = static_cast<const T*>(empty ? nullptr : from.row(chunk.begin));
      store(best + e, empty ? Vec<C>{} : load_n(row + e, least(kL, E - e)));
      const auto index = Vec<ArgOf<C>>{} + static_cast<ArgOf<C>>(empty ? -1 : chunk.begin);
      __builtin_memcpy(arg + e, &index, sizeof index);
    }
    for (int64_t t = chunk.begin + 1; t < chunk.end; ++t) {
      const auto row = static_cast<const T*>(from.row(t));
      const auto index = Vec<ArgOf<C>>{} + static_cast<ArgOf<C>>(t);
      const auto value = [&](int64_t e) { return e + kL <= E ? load(row + e) : load_n(row + e, E - e); };
      take_max<C>(width, value, [&](int64_t) { return index; }, best, arg);
    }
    if (chunk.slot < 0) finish(chunk.segment, best, arg);
  });
  parallel_for(S, num_threads, [&](int64_t s, int) {
    if (chunks.count(s) == 1) return;
    C* best = best_buffer.data() + chunks.slot(s) * width;
    ArgOf<C>* arg = arg_buffer.data() + chunks.slot(s) * width;
    for (int64_t c = 1; c < chunks.count(s); ++c) {
      const auto value = [&](int64_t e) { return load(best + c * width + e); };
      take_max<C>(width, value, [&](int64_t e) { return load_as<ArgOf<C>>(arg + c * width + e); }, best, arg);
    }
    finish(s, best, arg);
  });
}

template <class T>
void pool_sum(const Tensor& x, const Chunks& chunks, bool mean, const Tensor& out, int num_threads) {
  using C = ComputeOf<T>;
  const int64_t S = chunks.segments(), E = x.size[1];
  const RowReader from(x);
  AlignedBuffer<C> scratch(usable_threads(chunks.first(S), num_threads) * 3 * E);
  AlignedBuffer<C> partial(chunks.slot(S) * E);
  const auto finish = [&](int64_t s, const C* total) {
    const C divisor = mean ? static_cast<C>(most(1, chunks.length(s))) : C(1);
    round_row(total, divisor, E, out.ptr<T>() + s * E);
  };
  chunks.for_each(S, num_threads, [&](const Chunks::Chunk& chunk, int thread) {
    const auto row = [&](int64_t r) { return static_cast<const T*>(from.row(chunk.begin + r)); };
    C* mine = scratch.data() + thread * 3 * E;
    C* total = chunk.slot >= 0 ? partial.data() + chunk.slot * E : mine + 2 * E;
    sum_rows<T>(chunk.end - chunk.begin, E, row, mine, total);
    if (chunk.slot < 0) finish(chunk.segment, total);
  });
  parallel_for(S, num_threads, [&](int64_t s, int thread) {
    if (chunks.count(s) == 1) return;
    const auto row = [&](int64_t c) { return partial.data() + (chunks.slot(s) + c) * E; };
    C *mine = scratch.data() + thread * 3 * E, *total = mine + 2 * E;
    sum_rows<C>(chunks.count(s), E, row, mine, total);
    finish(s, total);
  });
}

void segment_pool_fwd(const Tensor& x, const Tensor& cu_seqlens, PoolMode mode, const Tensor& out, const Tensor& argmax,
                      int num_threads) {
  const Chunks chunks(cu_seqlens, x.size[0]);
  with_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (mode == PoolMode::max) return pool_max<T>(x, chunks, out, argmax, num_threads);
    if (mode != PoolMode::first) return pool_sum<T>(x, chunks, mode == PoolMode::mean, out, num_threads);
    const RowReader from(x);
    const RowWriter to(out.data, chunks.segments(), x.size[1] * static_cast<int64_t>(sizeof(T)));
    const int32_t* cu = cu_seqlens.ptr<const int32_t>();
    parallel_chunks(chunks.segments(), num_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) to.write(s, chunks.length(s) > 0 ? from.row(cu[s]) : nullptr);
      to.finish();
    });
  });
}

template <class T>
void pool_bwd(const Tensor& grad_out, const Tensor& cu_seqlens, const Tensor& argmax, PoolMode mode,
              const Tensor& grad_x, int num_threads) {
  using C = ComputeOf<T>;
  const Chunks chunks(cu_seqlens, grad_x.size[0]);
  const int64_t S = chunks.segments(), E = grad_x.size[1], all = chunks.first(S + 1);
  const int32_t* cu = cu_seqlens.ptr<const int32_t>();
  const RowReader from(grad_out);
  const RowWriter to(grad_x.data, grad_x.size[0], E * static_cast<int64_t>(sizeof(T)));
  AlignedBuffer<C> scratch(Chunks::threads(all, num_threads) * 2 * E);
  chunks.for_each(S + 1, num_threads, [&](const Chunks::Chunk& chunk, int thread) {
    const int64_t s = chunk.segment;
    const void* every_row = nullptr;
    if (s < S && mode == PoolMode::sum) every_row = from.row(s);
    if (s < S && mode == PoolMode::mean && chunk.begin < chunk.end) {
      C* wide = scratch.data() + thread * 2 * E;
      T* narrow = reinterpret_cast<T*>(wide + E);
      for (int64_t e = 0; e < E; e += kLanes<C>) {
        const int64_t n = least(kLanes<C>, E - e);
        store_n(wide + e, load_n(static_cast<const T*>(from.row(s)) + e, n), n);
      }
      round_row(wide, static_cast<C>(chunks.length(s)), E, narrow);
      every_row = narrow;
    }
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
      const bool is_first = mode == PoolMode::first && s < S && t == cu[s];
      to.write(t, is_first ? from.row(s) : every_row);
    }
    to.finish();
    if (s == S || mode != PoolMode::max) return;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t t = argmax.ptr<const int32_t>()[s * E + e];
      if (t >= chunk.begin && t < chunk.end) grad_x.ptr<T>()[t * E + e] = static_cast<const T*>(from.row(s))[e];
    }
  });
}

void segment_pool_bwd(const Tensor& grad_out, const Tensor& cu_seqlens, const Tensor& argmax, PoolMode mode,
                      const Tensor& grad_x, int num_threads) {
  with_type(grad_out.dtype, [&](auto* t) {
    pool_bwd<std::remove_pointer_t<decltype(t)>>(grad_out, cu_seqlens, argmax, mode, grad_x, num_threads);
  });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(PackingKernels, packing) = {&MMK_ISA::gather_fwd, &MMK_ISA::scatter_fwd, &MMK_ISA::segment_pool_fwd,
                                               &MMK_ISA::segment_pool_bwd};

}  // namespace mmk
