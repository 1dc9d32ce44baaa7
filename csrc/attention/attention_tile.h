// Device code shared by the attention kernels: the problem, tile sizes and loop bounds of a tile.
#pragma once

#include <climits>
#include <type_traits>

#include "attention/attention.h"
#include "common/check.h"
#include "common/cuda/dtype.h"
#include "common/cuda/launch.h"
#include "common/cuda/tanh.h"
#include "common/cuda/tile.h"

namespace mmk::cuda {

// Sizes and the row-interval mask. Positions are int32 (as the mask is), offsets in memory 64-bit.
struct AttentionProblem {
  int tq, tk, heads, heads_kv, d, dv;
  float scale;
  float softcap, scale_in_cap;      // scale / softcap; both 0 without a cap
  const int* __restrict__ lo;       // [Tq] first key that a query sees
  const int* __restrict__ hi;       // [Tq] one past the last
  const int* __restrict__ first_q;  // [Tk] hull of the queries that see a key; bounds loops only
  const int* __restrict__ last_q;   // [Tk]
};

// A tensor [tokens, heads, columns] with a contiguous last dimension; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t stride_token, stride_head;
  bool vectors;  // every row is 16-byte aligned

  // One head's rows before `end`.
  __device__ __forceinline__ Matrix<std::remove_const_t<T>> rows(int head, int end, int columns) const {
    return {data + head * stride_head, stride_token, end, columns, vectors};
  }
  __device__ __forceinline__ T* row(int token, int head) const {
    return data + token * stride_token + head * stride_head;
  }
};

template <class T>
Heads<T> heads_of(const Tensor& x) {
  return {x.ptr<T>(), x.stride[0], x.stride[1], rows_aligned(x, sizeof(T))};
}

// Tile sizes by element size and padded head dim (64, 128, 256). A warp owns 16 of the block's `outer` rows (queries in
// the forward and for dQ, keys for dK and dV), and the block loops over tiles of `inner` rows. Sized so that shared
// memory fits in 99 KB, the smallest devices' limit, and accumulators fit in 255 registers.
template <class T, int kD>
struct ForwardTile {
  static constexpr int outer = sizeof(T) == 4 && kD == 256 ? 32 : 64;
  static constexpr int inner = sizeof(T) == 2 ? (kD == 256 ? 32 : 64) : (kD == 64 ? 64 : kD == 128 ? 32 : 16);
};
template <class T, int kD>
struct BackwardTile {
  static constexpr int outer = sizeof(T) == 2 ? (kD == 256 ? 32 : 64) : (kD == 64 ? 64 : kD == 128 ? 32 : 16);
  static constexpr int inner = sizeof(T) == 2 ? (kD == 64 ? 64 : 32) : (kD == 256 ? 16 : 32);
};

// A logit, and its derivative by the scaled product.
struct Logit {
  float value, slope;
};

// scale * product, capped with kCapped; rounded identically in forward and backward, so that its difference from a
// maximum, or from the lse of a row that it dominates, is exact. (With an FMA it would not be.)
template <bool kCapped>
__device__ __forceinline__ Logit logit(const AttentionProblem& p, float product) {
  if constexpr (kCapped) {
    const Tanh tanh = tanh_of(__fmul_rn(product, p.scale_in_cap));
    return {__fmul_rn(tanh.value, p.softcap), tanh.slope};
  } else {
    return {__fmul_rn(product, p.scale), 1.f};
  }
}

struct Interval {
  int begin, end;
};

// The interval of one row, clamped to [0, limit]; {0, 0} if empty or past the last row.
__device__ __forceinline__ Interval interval_of(const int* first, const int* last, int row, int rows, int limit) {
  if (row >= rows) return {0, 0};
  const int begin = max(first[row], 0), end = min(last[row], limit);
  return begin < end ? Interval{begin, end} : Interval{0, 0};
}

// The hull of a tile's intervals, and the part that every row sees.
struct Hull {
  int begin, end;          // begin >= end: no row sees a key
  int all_begin, all_end;  // tiles inside need no mask
};

// Every warp computes the same hull for the block's kRows rows.
template <int kRows>
__device__ __forceinline__ Hull hull_of(const int* first, const int* last, int row0, int rows, int limit) {
  Hull hull{INT_MAX, 0, 0, INT_MAX};
  for (int row = row0 + threadIdx.x % kWarp; row < min(row0 + kRows, rows); row += kWarp) {
    const Interval seen = interval_of(first, last, row, rows, limit);
    if (seen.begin < seen.end) {
      hull.begin = min(hull.begin, seen.begin);
      hull.end = max(hull.end, seen.end);
    }
    hull.all_begin = max(hull.all_begin, seen.begin);
    hull.all_end = min(hull.all_end, seen.end);
  }
  hull.begin = warp_reduce(hull.begin, Min{});
  hull.end = warp_reduce(hull.end, Max{});
  hull.all_begin = warp_reduce(hull.all_begin, Max{});
  hull.all_end = warp_reduce(hull.all_end, Min{});
  return hull;
}

template <class Args>
AttentionProblem problem_of(const Args& args) {
  const Tensor &q = args.q, &k = args.k;
  const double softcap = args.extras.softcap;
  MMK_CHECK(q.size[0] <= INT_MAX && k.size[0] <= INT_MAX, "attention: more than 2^31 - 1 tokens");
  return {static_cast<int>(q.size[0]),
          static_cast<int>(k.size[0]),
          static_cast<int>(q.size[1]),
          static_cast<int>(k.size[1]),
          static_cast<int>(q.size[2]),
          static_cast<int>(args.v.size[2]),
          static_cast<float>(args.scale),
          static_cast<float>(softcap),
          softcap > 0 ? static_cast<float>(args.scale / softcap) : 0.f,
          args.mask.lo.template ptr<int>(),
          args.mask.hi.template ptr<int>(),
          args.mask.first_q.template ptr<int>(),
          args.mask.last_q.template ptr<int>()};
}

// Calls run(T{}, integral_constant<int, padded head dim>, bool_constant<capped>).
template <class Args, class Run>
void choose_attention_kernel(const Args& args, const Run& run) {
  const int64_t d = args.q.size[2] > args.v.size[2] ? args.q.size[2] : args.v.size[2];
  MMK_CHECK(d >= 1 && d <= 256, "attention: the CUDA kernels support head dims 1 to 256, got ", d);
  const auto with_head_dim = [&](auto element, auto capped) {
    if (d <= 64) return run(element, std::integral_constant<int, 64>{}, capped);
    if (d <= 128) return run(element, std::integral_constant<int, 128>{}, capped);
    return run(element, std::integral_constant<int, 256>{}, capped);
  };
  with_dtype(args.q.dtype, "attention", [&](auto element) {
    if (args.extras.softcap > 0) return with_head_dim(element, std::true_type{});
    return with_head_dim(element, std::false_type{});
  });
}

}  // namespace mmk::cuda
