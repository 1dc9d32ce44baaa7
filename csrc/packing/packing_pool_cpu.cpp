// Segment pooling on CPU. Segments are split into chunks of kChunkRows rows, so that one long segment uses all threads.
// Neither the chunks nor the order of additions depends on the number of threads.
#include "packing/packing.h"

#include <type_traits>

#include "common/parallel.h"
#include "packing/packing_sums.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;

// The rows of all segments, split into chunks of at most kChunkRows; an empty segment is one empty chunk. Rows past the
// last segment follow as chunks of segment S.
class Chunks {
 public:
  struct Chunk {
    int64_t segment, begin, end;
    int64_t slot;  // index of its partial result, or -1 if it is its segment's only chunk
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
  int64_t slot(int64_t s) const { return slot_.data()[s]; }  // first partial result of a segment with several chunks
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

// Updates best, arg [width] with a row of values whose columns come from rows `from(e)`: a larger value or the first
// NaN wins.
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

// Sum of the rows times weights [T] in the compute type, or unweighted if null.
template <class T>
void pool_sum(const Tensor& x, const ComputeOf<T>* weights, const Chunks& chunks, bool mean, const Tensor& out,
              int num_threads) {
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
    if (weights != nullptr) {
      sum_rows<T>(chunk.end - chunk.begin, E, row, Weighted<C>{weights + chunk.begin}, mine, total);
    } else {
      sum_rows<T>(chunk.end - chunk.begin, E, row, Plain{}, mine, total);
    }
    if (chunk.slot < 0) finish(chunk.segment, total);
  });
  parallel_for(S, num_threads, [&](int64_t s, int thread) {
    if (chunks.count(s) == 1) return;
    const auto row = [&](int64_t c) { return partial.data() + (chunks.slot(s) + c) * E; };
    C *mine = scratch.data() + thread * 3 * E, *total = mine + 2 * E;
    sum_rows<C>(chunks.count(s), E, row, Plain{}, mine, total);
    finish(s, total);
  });
}

void segment_pool_fwd(const Tensor& x, const Tensor& cu_seqlens, PoolMode mode, const Tensor& out, const Tensor& argmax,
                      int num_threads) {
  const Chunks chunks(cu_seqlens, x.size[0]);
  with_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (mode == PoolMode::max) return pool_max<T>(x, chunks, out, argmax, num_threads);
    if (mode != PoolMode::first) return pool_sum<T>(x, nullptr, chunks, mode == PoolMode::mean, out, num_threads);
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
  with_dtype(grad_out.dtype,
             [&](auto t) { pool_bwd<decltype(t)>(grad_out, cu_seqlens, argmax, mode, grad_x, num_threads); });
}

// ---- weighted pooling -----------------------------------------------------------------------------------------------

void weighted_pool_fwd(const Tensor& x, const Tensor& weights, const Tensor& cu_seqlens, const Tensor& out,
                       int num_threads) {
  const Chunks chunks(cu_seqlens, x.size[0]);
  with_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    pool_sum<T>(x, weights.ptr<const ComputeOf<T>>(), chunks, false, out, num_threads);
  });
}

// scaled [width] = weight * grad, rounded to T; returns <x, grad>, summed in blocks so that the error does not grow
// with the width. `next` [width] is the row read after x.
template <class T>
MMK_INLINE ComputeOf<T> scale_and_dot(const T* x, const T* next, const T* grad, ComputeOf<T> weight, int64_t width,
                                      T* scaled) {
  using C = ComputeOf<T>;
  constexpr int kL = kLanes<C>;
  Vec<C> total{};
  for (int64_t begin = 0; begin < width; begin += 16 * kL) {
    const int64_t end = least(width, begin + 16 * kL);
    Vec<C> even{}, odd{};
    int64_t e = begin;
    for (; e + 2 * kL <= end; e += 2 * kL) {
      const auto g0 = load(grad + e), g1 = load(grad + e + kL);
      __builtin_prefetch(next + e), __builtin_prefetch(next + e + kL);
      even = fma(load(x + e), g0, even), odd = fma(load(x + e + kL), g1, odd);
      store(scaled + e, g0 * splat(weight)), store(scaled + e + kL, g1 * splat(weight));
    }
    for (; e < end; e += kL) {
      const int64_t n = least(kL, end - e);
      const auto g = load_n(grad + e, n);
      even = fma(load_n(x + e, n), g, even);
      store_n(scaled + e, g * splat(weight), n);
    }
    total += even + odd;
  }
  return reduce_add(total);
}

template <class T>
void weighted_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& weights, const Tensor& cu_seqlens,
                  const Tensor& grad_x, const Tensor& grad_weights, int num_threads) {
  using C = ComputeOf<T>;
  const Chunks chunks(cu_seqlens, x.size[0]);
  const int64_t S = chunks.segments(), E = x.size[1], all = chunks.first(S + 1), last = x.size[0] - 1;
  const RowReader from(x), grads(grad_out);
  const RowWriter to(grad_x.data, x.size[0], E * static_cast<int64_t>(sizeof(T)));
  AlignedBuffer<T> scratch(Chunks::threads(all, num_threads) * E);
  chunks.for_each(S + 1, num_threads, [&](const Chunks::Chunk& chunk, int thread) {
    T* scaled = scratch.data() + thread * E;
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
      C dot = 0;
      if (chunk.segment < S) {
        const auto *row = static_cast<const T*>(from.row(t)),
                   *next = static_cast<const T*>(from.row(least(t + 1, last)));
        const auto* grad = static_cast<const T*>(grads.row(chunk.segment));
        dot = scale_and_dot(row, next, grad, weights.ptr<const C>()[t], E, scaled);
      }
      grad_weights.ptr<C>()[t] = dot;
      to.write(t, chunk.segment < S ? scaled : nullptr);
    }
    to.finish();
  });
}

void weighted_pool_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& weights, const Tensor& cu_seqlens,
                       const Tensor& grad_x, const Tensor& grad_weights, int num_threads) {
  with_dtype(x.dtype, [&](auto t) {
    weighted_bwd<decltype(t)>(grad_out, x, weights, cu_seqlens, grad_x, grad_weights, num_threads);
  });
}

}  // namespace
}  // namespace MMK_ISA

MMK_DEFINE_KERNELS(PoolingKernels, pooling) = {&MMK_ISA::segment_pool_fwd, &MMK_ISA::segment_pool_bwd,
                                               &MMK_ISA::weighted_pool_fwd, &MMK_ISA::weighted_pool_bwd};

}  // namespace mmk
