// Shared by the sm_90a attention kernels: the problem with its pattern, the ring of tiles that one warp fetches and two
// warpgroups multiply, and the masks.
//
// The producer, the first warp of the first warpgroup, decides for each tile whether to skip it, mask it or compute it
// whole. It passes the decision to the consumers in the ring, next to the tile; they do not read the map.
//
// Head dims are padded to kD, 64 or 128, with zeros filled in by TMA.
#pragma once

#include "attention/attention_sm90.h"
#include "attention/attention_tile.h"
#include "common/cuda/sm90.h"
#include "common/cuda/tensor_map.h"

namespace mmk::cuda::attention_sm90 {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kRows = 2 * 64;  // owned by a block: 64 per consumer warpgroup
constexpr int kConsumerWarps = 8;

// Registers per thread: 128 * 24 + 256 * 240 of 65536; or 128 * 40 + 256 * 232 for a producer that needs more.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kBusyProducerRegisters = 40, kBusyConsumerRegisters = 232;

constexpr float kLog2E = 1.4426950408889634f;

// Tile sizes and states of the map (mmkernels/ops/attention/tiles.py).
constexpr int kMapQ = 128, kMapK = 64, kMapWord = 16;
enum State : int { kSkip = 0, kPartial = 1, kFull = 2, kEnd = 3 };

// Spans and classes inside the intervals; all of them, or null.
struct Pattern {
  const int* __restrict__ span_q;   // [Tq]
  const int* __restrict__ span_k;   // [Tk]
  const int* __restrict__ allow_q;  // [Tq]
  const int* __restrict__ bit_k;    // [Tk]
  const int* __restrict__ tiles;    // [ceil(Tq / 128), words]
  int words;

  __device__ __forceinline__ bool given() const { return tiles != nullptr; }

  // The state of kKeys keys starting at key0, a multiple of kKeys, against the kMapQ queries around `query`.
  template <int kKeys>
  __device__ __forceinline__ State state(int query, int key0) const {
    static_assert(kKeys % kMapK == 0 && kMapK * kMapWord % kKeys == 0, "tiles of one word");
    constexpr int kTiles = kKeys / kMapK;
    constexpr unsigned kAll = (1u << 2 * kTiles) - 1, kWhole = kAll / 3 * kFull;
    const int tile = key0 / kMapK;
    const auto word = static_cast<unsigned>(tiles[static_cast<int64_t>(query / kMapQ) * words + tile / kMapWord]);
    const unsigned states = word >> (2 * (tile % kMapWord)) & kAll;
    return states == 0 ? kSkip : states == kWhole ? kFull : kPartial;
  }
};

// Scores are s' = sign * <q, k>, or tanh(scale_in_cap * <q, k>) with a soft cap, and logits in log2 are scale2 * s'
// with scale2 > 0, so that the maximum score is the maximum logit for either sign of the scale.
struct Sm90Problem {
  AttentionProblem p;
  Pattern pattern;
  float sign, scale2;

  // The score of a product, and its derivative by scale_in_cap * product.
  __device__ __forceinline__ Tanh capped(float product) const { return tanh_of(product * p.scale_in_cap); }

  // Products to scores without a cap.
  template <int NI>
  __device__ __forceinline__ void apply_sign(float (&s)[NI][4]) const {
    if (sign == 1.f) return;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[ni][e] *= sign;
    }
  }
};

// ---- the ring -------------------------------------------------------------------------------------------------------

// A stage's tile position and what to do with the tile. kEnd follows the last tile.
struct Step {
  int first, state;
};

template <int kStages>
struct Barriers {
  Barrier fixed, full[kStages], empty[kStages];
  Step steps[kStages];

  // Called by the whole block; ends with a barrier. `producers` threads arrive at a full stage.
  __device__ __forceinline__ void init(int producers) {
    if (threadIdx.x == 0) {
      barrier_init(&fixed, 1);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&full[i], producers);
        barrier_init(&empty[i], kConsumerWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }
};

__device__ __forceinline__ void release(Barrier* empty) {
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// Fetches tile [kTokens, kD] of a head as kD / 64 consecutive tiles of [kTokens, 64].
template <int kTokens, int kD>
constexpr int kTileBytes = kTokens * kD * 2;

template <int kTokens, int kD>
__device__ __forceinline__ void fetch(unsigned char* target, const TensorMap& map, Barrier* full, int token, int head) {
#pragma unroll
  for (int d = 0; d < kD; d += kSwizzleDepth) tma_load(target + kTokens * d * 2, map, full, d, token, head);
}

// ---- products -------------------------------------------------------------------------------------------------------

// acc = A B^T of a warpgroup: A [64, kD] is part of a tile of kTokensA rows, B [8 NI, kD] is a tile.
template <class T, int kD, int kTokensA, int NI>
__device__ __forceinline__ void multiply_rows(float (&acc)[NI][4], const unsigned char* a, const unsigned char* b) {
#pragma unroll
  for (int k = 0; k < kD; k += 16) {
    const int half = k / kSwizzleDepth, step = k % kSwizzleDepth / 16;
    wgmma<T, Major::k, Major::k>(
        acc, k_descriptor(a + half * kTokensA * kSwizzleRow) + step * kDescriptorStep<Major::k>,
        k_descriptor(b + half * 8 * NI * kSwizzleRow) + step * kDescriptorStep<Major::k>, k > 0);
  }
}

// acc += A B: A [64, 16 KI] from registers, B [16 KI, 8 NI] is a tile of 16 KI tokens.
template <class T, int KI, int NI>
__device__ __forceinline__ void multiply_tokens(float (&acc)[NI][4], const uint32_t (&a)[KI][4],
                                                const unsigned char* b) {
  const uint64_t tile = outer_descriptor<16 * KI>(b);
#pragma unroll
  for (int i = 0; i < KI; ++i) {
    wgmma<T, Major::outer>(acc, a[i], tile + i * kDescriptorStep<Major::outer>, true);
  }
}

// Converts an accumulator [64, 16 KI] to the left operand of another product.
template <class T, int KI>
__device__ __forceinline__ void to_operand(uint32_t (&a)[KI][4], const float (&acc)[2 * KI][4]) {
#pragma unroll
  for (int i = 0; i < KI; ++i) {
    a[i][0] = pack2<T>(acc[2 * i][0], acc[2 * i][1]);
    a[i][1] = pack2<T>(acc[2 * i][2], acc[2 * i][3]);
    a[i][2] = pack2<T>(acc[2 * i + 1][0], acc[2 * i + 1][1]);
    a[i][3] = pack2<T>(acc[2 * i + 1][2], acc[2 * i + 1][3]);
  }
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// A query's visible keys.
struct Sight {
  int begin, end;   // keys
  int span, allow;  // with a pattern

  __device__ __forceinline__ Sight(const Sm90Problem& a, int query) {
    const Interval seen = interval_of(a.p.lo, a.p.hi, query, a.p.tq, a.p.tk);
    begin = seen.begin, end = seen.end;
    const bool ask = a.pattern.given() && query < a.p.tq;
    span = ask ? a.pattern.span_q[query] : 0;
    allow = ask ? a.pattern.allow_q[query] : 0;
  }
};

// Calls hide(ni, e) for the accumulator's keys key0 + 8 ni + column that row e / 2 does not see.
template <int NI, class Hide>
__device__ __forceinline__ void for_hidden(const Sm90Problem& a, const Sight (&row)[2], int key0, const Hide& hide) {
  const int first = key0 + fragment_column(0);
#pragma unroll
  for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first + 8 * ni + e % 2;
      if (key < row[e / 2].begin || key >= row[e / 2].end) hide(ni, e);
    }
  }
  if (!a.pattern.given()) return;
#pragma unroll
  for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = min(first + 8 * ni + c, a.p.tk - 1), span = a.pattern.span_k[key], bit = a.pattern.bit_k[key];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row[r].span != span && (row[r].allow & bit) == 0) hide(ni, 2 * r + c);
      }
    }
  }
}

// Calls visit(key0, state) for the tiles of kKeys keys that the kRows queries starting at query0 see. Called by a whole
// warp.
template <int kKeys, class Visit>
__device__ __forceinline__ void for_key_tiles(const Sm90Problem& a, int query0, const Visit& visit) {
  const Hull hull = hull_of<kRows>(a.p.lo, a.p.hi, query0, a.p.tq, a.p.tk);
  const bool mapped = a.pattern.given();  // tiles are then aligned to their size
#pragma unroll 1
  for (int key0 = mapped ? hull.begin / kKeys * kKeys : hull.begin; key0 < hull.end; key0 += kKeys) {
    const bool whole = key0 >= hull.all_begin && key0 + kKeys <= hull.all_end;
    const State state = mapped ? a.pattern.state<kKeys>(query0, key0) : whole ? kFull : kPartial;
    if (state != kSkip) visit(key0, state);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Boxes of [tokens, 64] of one head of x [T, H, D].
inline TensorMap tokens_map(const Tensor& x, int tokens) {
  return tensor_map(
      x.dtype,
      {3, x.data, {x.size[2], x.size[0], x.size[1]}, {1, x.stride[0], x.stride[1]}, {kSwizzleDepth, tokens, 1}});
}

template <class Args>
Sm90Problem sm90_problem_of(const Args& args) {
  const AttentionProblem p = problem_of(args);
  const AttentionExtras& x = args.extras;
  const Pattern pattern{x.span_q.ptr<int>(), x.span_k.ptr<int>(), x.allow_q.ptr<int>(),
                        x.bit_k.ptr<int>(),  x.tiles.ptr<int>(),  static_cast<int>(x.tiles.size[1])};
  if (p.softcap > 0.f) return {p, pattern, 1.f, p.softcap * kLog2E};
  const float sign = p.scale > 0.f ? 1.f : p.scale < 0.f ? -1.f : 0.f;
  return {p, pattern, sign, sign == 0.f ? 1.f : p.scale * sign * kLog2E};
}

// Calls run(T{}, integral_constant<int, padded head dim>, bool_constant<capped>).
template <class Args, class Run>
void choose_sm90_kernel(const Args& args, const Run& run) {
  const bool small = args.q.size[2] <= 64 && args.v.size[2] <= 64;
  const auto with_head_dim = [&](auto element, auto capped) {
    if (small) return run(element, std::integral_constant<int, 64>{}, capped);
    return run(element, std::integral_constant<int, 128>{}, capped);
  };
  const auto with_cap = [&](auto element) {
    if (args.extras.softcap > 0) return with_head_dim(element, std::true_type{});
    return with_head_dim(element, std::false_type{});
  };
  return args.q.dtype == DType::bf16 ? with_cap(bf16{}) : with_cap(f16{});
}

}  // namespace mmk::cuda::attention_sm90
