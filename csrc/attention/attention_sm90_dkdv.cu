// Attention backward for sm_90a, first half: dK and dV, with the products of attention_bwd.cu. A block owns keys and
// recomputes the probabilities. Every sum has one owner.
#include "attention/attention_sm90_tile.h"

namespace mmk::cuda {
namespace attention_sm90 {
namespace {

constexpr int kQueries = 64;  // per tile
static_assert(kMapQ % kQueries == 0 && kRows % kMapK == 0, "tiles inside those of the map");

template <class T>
struct KeysParams {
  Sm90Problem problem;
  TensorMap q, grad_out, k, v;      // boxes of [kQueries, 64], [kRows, 64]
  const float* __restrict__ lse;    // [H, Tq]
  const float* __restrict__ delta;  // [H, Tq]
  // outputs
  Heads<T> dk;  // [Tk, Hkv, D]
  Heads<T> dv;  // [Tk, Hkv, Dv]
};

// Per-query inputs of a tile's scores.
struct QueryStats {
  float lse2[kQueries], delta[kQueries];  // lse in log2
  int begin[kQueries], end[kQueries];     // keys a query sees
  int span[kQueries], allow[kQueries];    // with a pattern
};

template <int kD>
struct KeysSmem {
  static constexpr int kStages = kD == 64 ? 4 : 3;
  static constexpr int kTile = kTileBytes<kQueries, kD>, kStage = 2 * kTile;
  static constexpr int k = 0, v = k + kTileBytes<kRows, kD>, stages = v + kTileBytes<kRows, kD>;
  static constexpr int stats = stages + kStages * kStage;
  static constexpr int barriers = stats + kStages * static_cast<int>(sizeof(QueryStats));
  static constexpr int bytes = kSwizzleTile + barriers + static_cast<int>(sizeof(Barriers<kStages>));
  static_assert(bytes <= 227 * 1024, "what a block may have");
};

// Calls visit(query0, state) for the query tiles that see some of the kRows keys starting at key0. Called by a whole
// warp.
template <class Visit>
__device__ __forceinline__ void for_query_tiles(const Sm90Problem& a, int key0, const Hull& hull, const Visit& visit) {
  const AttentionProblem& p = a.p;
  const bool mapped = a.pattern.given();  // then tiles begin at multiples of their size
#pragma unroll 1
  for (int query0 = mapped ? hull.begin / kQueries * kQueries : hull.begin; query0 < hull.end; query0 += kQueries) {
    State state;
    if (mapped) {
      state = a.pattern.state<kRows>(query0, key0);
    } else {
      // The hull of the keys' queries may contain many that see none of them.
      const Hull keys = hull_of<kQueries>(p.lo, p.hi, query0, p.tq, p.tk);
      const bool whole = key0 >= keys.all_begin && key0 + kRows <= keys.all_end;
      state = keys.begin >= key0 + kRows || keys.end <= key0 ? kSkip : whole ? kFull : kPartial;
    }
    if (state != kSkip) visit(query0, state);
  }
}

// Calls hide(ni, e) for the accumulator's pairs of key own_key (+ 8) and a query of the tile that does not see it.
template <int NI, class Hide>
__device__ __forceinline__ void for_hidden_keys(const Sm90Problem& a, const QueryStats& stats, int own_key,
                                                const Hide& hide) {
  const Pattern& pattern = a.pattern;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = own_key + 8 * r, safe_key = min(key, a.p.tk - 1);
    const int span = pattern.given() ? pattern.span_k[safe_key] : 0;
    const int bit = pattern.given() ? pattern.bit_k[safe_key] : 0;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = 8 * ni + fragment_column(c);
        const bool inside = key >= stats.begin[i] && key < stats.end[i];
        const bool chosen = !pattern.given() || stats.span[i] == span || (stats.allow[i] & bit) != 0;
        if (!inside || !chosen) hide(ni, 2 * r + c);
      }
    }
  }
}

// Called by the whole warp: its lanes fetch the queries' QueryStats.
template <class T, int kD>
__device__ __forceinline__ void produce(const KeysParams<T>& a, unsigned char* smem,
                                        Barriers<KeysSmem<kD>::kStages>& tiles, int key0, int head_kv) {
  using Smem = KeysSmem<kD>;
  const AttentionProblem& p = a.problem.p;
  const int group = p.heads / p.heads_kv, lane = threadIdx.x;
  const Hull hull = hull_of<kRows>(p.first_q, p.last_q, key0, p.tk, p.tq);
  Ring<Smem::kStages> ring;
  if (lane == 0) {
    barrier_arrive_expect(&tiles.fixed, 2 * kTileBytes<kRows, kD>);
    fetch<kRows, kD>(smem + Smem::k, a.k, &tiles.fixed, key0, head_kv);
    fetch<kRows, kD>(smem + Smem::v, a.v, &tiles.fixed, key0, head_kv);
  }
#pragma unroll 1
  for (int head = head_kv * group; head < (head_kv + 1) * group; ++head) {
    for_query_tiles(a.problem, key0, hull, [&](int query0, int state) {
      Barrier* full = &tiles.full[ring.slot];
      barrier_wait(&tiles.empty[ring.slot], ring.parity ^ 1);
      QueryStats& stats = reinterpret_cast<QueryStats*>(smem + Smem::stats)[ring.slot];
#pragma unroll 1
      for (int i = lane; i < kQueries; i += kWarp) {
        const int query = query0 + i;
        const Sight sight(a.problem, query);
        const bool exists = query < p.tq;
        const int64_t at = static_cast<int64_t>(head) * p.tq + query;
        stats.lse2[i] = exists ? a.lse[at] * kLog2E : 0.f;
        stats.delta[i] = exists ? a.delta[at] : 0.f;
        stats.begin[i] = sight.begin, stats.end[i] = sight.end;
        stats.span[i] = sight.span, stats.allow[i] = sight.allow;
      }
      if (lane == 0) {
        tiles.steps[ring.slot] = {query0, state};
        unsigned char* stage = smem + Smem::stages + ring.slot * Smem::kStage;
        barrier_arrive_expect(full, Smem::kStage);
        fetch<kQueries, kD>(stage, a.q, full, query0, head);
        fetch<kQueries, kD>(stage + Smem::kTile, a.grad_out, full, query0, head);
      } else {
        barrier_arrive(full);
      }
      ring.next();
    });
  }
  barrier_wait(&tiles.empty[ring.slot], ring.parity ^ 1);
  if (lane == 0) tiles.steps[ring.slot] = {0, kEnd};
  barrier_arrive(&tiles.full[ring.slot]);
}

// Grid (key tiles, key/value heads): a block owns 128 keys of one head and loops over the tiles of 64 queries that see
// some of them, once per query head of the group. A producer and two consumer warpgroups of 64 keys each, with dK and
// dV in registers (kD / 2 each). Everything is transposed, so that the accumulators of p and ds [keys, queries] are
// already left operands. Shared memory: K, V [128, kD] throughout; three (kD = 128) or four stages of Q and grad_out
// [64, kD] and of the queries' statistics: 165 or 102 KB.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1) attention_bwd_dkdv_sm90_kernel(const __grid_constant__ KeysParams<T> a) {
  using Smem = KeysSmem<kD>;
  constexpr int NI = kQueries / 8, NO = kD / 8;
  unsigned char* smem = aligned_smem();
  auto& tiles = *reinterpret_cast<Barriers<Smem::kStages>*>(smem + Smem::barriers);
  tiles.init(kWarp);
  const AttentionProblem& p = a.problem.p;
  const int key0 = blockIdx.x * kRows, head_kv = blockIdx.y;
  if (threadIdx.x < kWarpgroup) {
    give_registers<kBusyProducerRegisters>();
    if (threadIdx.x < kWarp) produce<T, kD>(a, smem, tiles, key0, head_kv);
    return;
  }

  take_registers<kBusyConsumerRegisters>();
  const int consumer = warp_uniform(threadIdx.x / kWarpgroup - 1);
  const int own_key = key0 + consumer * 64 + threadIdx.x % kWarpgroup / kWarp * 16 + fragment_row(0);
  const unsigned char* k_rows = smem + Smem::k + consumer * 64 * kSwizzleRow;
  const unsigned char* v_rows = smem + Smem::v + consumer * 64 * kSwizzleRow;
  Ring<Smem::kStages> ring;
  float dk[NO][4] = {}, dv[NO][4] = {};
  barrier_wait(&tiles.fixed, 0);
#pragma unroll 1
  for (;; ring.next()) {
    barrier_wait(&tiles.full[ring.slot], ring.parity);
    const int state = warp_uniform(tiles.steps[ring.slot].state);
    if (state == kEnd) break;
    const unsigned char* q_tile = smem + Smem::stages + ring.slot * Smem::kStage;
    const unsigned char* grad_out_tile = q_tile + Smem::kTile;
    const QueryStats& stats = reinterpret_cast<const QueryStats*>(smem + Smem::stats)[ring.slot];
    float s[NI][4], ds[NI][4];
    uint32_t p_operand[NI / 2][4], ds_operand[NI / 2][4];
    wgmma_fence();
    multiply_rows<T, kD, kRows>(s, k_rows, q_tile);
    wgmma_commit();
    wgmma_fence();
    multiply_rows<T, kD, kRows>(ds, v_rows, grad_out_tile);
    wgmma_commit();

    const auto for_hidden_pairs = [&](const auto& hide) {
      if (state == kPartial) for_hidden_keys<NI>(a.problem, stats, own_key, hide);
    };
    const auto per_query = [](const float* x, int ni) {  // of the accumulator's two columns
      return *reinterpret_cast<const float2*>(&x[8 * ni + fragment_column(0)]);
    };
    if constexpr (kCapped) {
      wgmma_wait<1>();
      accumulator_ready(s);
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[ni][e] = tanh_seed(s[ni][e] * p.scale_in_cap);
      }
      wgmma_wait<0>();
      accumulator_ready(ds);
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
        const float2 lse2 = per_query(stats.lse2, ni), delta = per_query(stats.delta, ni);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Tanh score = tanh_of_seed(s[ni][e]);
          s[ni][e] = exp2_fast(fmaf(score.value, a.problem.scale2, -(e % 2 == 0 ? lse2.x : lse2.y)));
          ds[ni][e] = s[ni][e] * (ds[ni][e] - (e % 2 == 0 ? delta.x : delta.y)) * score.slope;
        }
      }
      for_hidden_pairs([&](int ni, int e) { s[ni][e] = ds[ni][e] = 0.f; });
    } else {
      wgmma_wait<1>();
      accumulator_ready(s);
      a.problem.apply_sign(s);
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
        const float2 lse2 = per_query(stats.lse2, ni);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[ni][e] = exp2_fast(fmaf(s[ni][e], a.problem.scale2, -(e % 2 == 0 ? lse2.x : lse2.y)));
        }
      }
      for_hidden_pairs([&](int ni, int e) { s[ni][e] = 0.f; });
      wgmma_wait<0>();
      accumulator_ready(ds);
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
        const float2 delta = per_query(stats.delta, ni);
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[ni][e] = s[ni][e] * (ds[ni][e] - (e % 2 == 0 ? delta.x : delta.y));
      }
    }
    to_operand<T>(p_operand, s);
    to_operand<T>(ds_operand, ds);
    wgmma_fence();
    multiply_tokens<T>(dv, p_operand, grad_out_tile);
    multiply_tokens<T>(dk, ds_operand, q_tile);
    wgmma_commit();
    wgmma_wait<0>();
    accumulator_ready(dv);
    accumulator_ready(dk);
    release(&tiles.empty[ring.slot]);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = own_key + 8 * r;
    if (key >= p.tk) continue;
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      const int column = no * 8 + fragment_column(0);
      store_pair(a.dk.row(key, head_kv), column, p.d, dk[no][2 * r] * p.scale, dk[no][2 * r + 1] * p.scale,
                 a.dk.vectors);
      store_pair(a.dv.row(key, head_kv), column, p.dv, dv[no][2 * r], dv[no][2 * r + 1], a.dv.vectors);
    }
  }
}

}  // namespace
}  // namespace attention_sm90

void launch_attention_dkdv_sm90(const AttentionBwdArgs& args, void* stream) {
  using namespace attention_sm90;
  choose_sm90_kernel(args, [&](auto element, auto head_dim, auto capped) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    const KeysParams<T> params{
        sm90_problem_of(args),     tokens_map(args.q, kQueries), tokens_map(args.grad_out, kQueries),
        tokens_map(args.k, kRows), tokens_map(args.v, kRows),    args.lse.ptr<float>(),
        args.delta.ptr<float>(),   heads_of<T>(args.dk),         heads_of<T>(args.dv)};
    const AttentionProblem& p = params.problem.p;
    launch("attention_bwd_dkdv_sm90", attention_bwd_dkdv_sm90_kernel<T, kD, kCapped>,
           dim3((p.tk + kRows - 1) / kRows, p.heads_kv), kThreads, KeysSmem<kD>::bytes, stream, params);
  });
}

}  // namespace mmk::cuda
