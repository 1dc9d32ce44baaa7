// Attention backward for sm_90a, second half: dQ, with the products of attention_bwd.cu. A block owns queries and
// recomputes the probabilities. Every sum has one owner.
#include "attention/attention_sm90_tile.h"

namespace mmk::cuda {
namespace attention_sm90 {
namespace {

template <class T>
struct QueriesParams {
  Sm90Problem problem;
  TensorMap q, grad_out, k, v;      // boxes of [kRows, 64], [keys of a tile, 64]
  const float* __restrict__ lse;    // [H, Tq]
  const float* __restrict__ delta;  // [H, Tq]
  // output
  Heads<T> dq;  // [Tq, H, D]
};

template <int kD>
struct QueriesSmem {
  static constexpr int kKeys = kD == 64 ? 128 : 64;  // per tile
  static constexpr int kStages = 3;
  static constexpr int kTile = kTileBytes<kKeys, kD>, kStage = 2 * kTile;
  static constexpr int q = 0, grad_out = q + kTileBytes<kRows, kD>, stages = grad_out + kTileBytes<kRows, kD>;
  static constexpr int barriers = stages + kStages * kStage;
  static constexpr int bytes = kSwizzleTile + barriers + static_cast<int>(sizeof(Barriers<kStages>));
  static_assert(bytes <= 227 * 1024, "what a block may have");
};

template <class T, int kD>
__device__ __forceinline__ void produce(const QueriesParams<T>& a, unsigned char* smem,
                                        Barriers<QueriesSmem<kD>::kStages>& tiles, int query0, int head) {
  using Smem = QueriesSmem<kD>;
  const int head_kv = head / (a.problem.p.heads / a.problem.p.heads_kv);
  const bool leads = threadIdx.x == 0;
  Ring<Smem::kStages> ring;
  if (leads) {
    barrier_arrive_expect(&tiles.fixed, 2 * kTileBytes<kRows, kD>);
    fetch<kRows, kD>(smem + Smem::q, a.q, &tiles.fixed, query0, head);
    fetch<kRows, kD>(smem + Smem::grad_out, a.grad_out, &tiles.fixed, query0, head);
  }
  for_key_tiles<Smem::kKeys>(a.problem, query0, [&](int key0, int state) {
    if (leads) {
      Barrier* full = &tiles.full[ring.slot];
      unsigned char* stage = smem + Smem::stages + ring.slot * Smem::kStage;
      barrier_wait(&tiles.empty[ring.slot], ring.parity ^ 1);
      tiles.steps[ring.slot] = {key0, state};
      barrier_arrive_expect(full, Smem::kStage);
      fetch<Smem::kKeys, kD>(stage, a.k, full, key0, head_kv);
      fetch<Smem::kKeys, kD>(stage + Smem::kTile, a.v, full, key0, head_kv);
    }
    ring.next();
  });
  if (leads) {
    barrier_wait(&tiles.empty[ring.slot], ring.parity ^ 1);
    tiles.steps[ring.slot] = {0, kEnd};
    barrier_arrive(&tiles.full[ring.slot]);
  }
}

// Grid (query tiles, heads), the last queries first. A block owns 128 queries of one head; a producer and two consumer
// warpgroups of 64 queries each, with dQ in registers (kD / 2).
// Shared memory: Q, grad_out [128, kD] throughout; three stages of K and V, [64, 128] or [128, 64] each: 160 or 128 KB.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_dq_sm90_kernel(const __grid_constant__ QueriesParams<T> a) {
  using Smem = QueriesSmem<kD>;
  constexpr int NI = Smem::kKeys / 8, NO = kD / 8;
  unsigned char* smem = aligned_smem();
  auto& tiles = *reinterpret_cast<Barriers<Smem::kStages>*>(smem + Smem::barriers);
  tiles.init(1);
  const AttentionProblem& p = a.problem.p;
  const int query0 = (gridDim.x - 1 - blockIdx.x) * kRows, head = blockIdx.y;
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarp) produce<T, kD>(a, smem, tiles, query0, head);
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = warp_uniform(threadIdx.x / kWarpgroup - 1);
  const int own_query = query0 + consumer * 64 + threadIdx.x % kWarpgroup / kWarp * 16 + fragment_row(0);
  const unsigned char* q_rows = smem + Smem::q + consumer * 64 * kSwizzleRow;
  const unsigned char* grad_out_rows = smem + Smem::grad_out + consumer * 64 * kSwizzleRow;
  const Sight row[2] = {Sight(a.problem, own_query), Sight(a.problem, own_query + 8)};
  float lse2[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = own_query + 8 * r < p.tq;
    const int64_t at = static_cast<int64_t>(head) * p.tq + own_query + 8 * r;
    lse2[r] = exists ? a.lse[at] * kLog2E : 0.f;
    delta[r] = exists ? a.delta[at] : 0.f;
  }
  Ring<Smem::kStages> ring;
  float dq[NO][4] = {};
  barrier_wait(&tiles.fixed, 0);
#pragma unroll 1
  for (;; ring.next()) {
    barrier_wait(&tiles.full[ring.slot], ring.parity);
    const Step step = tiles.steps[ring.slot];
    const int state = warp_uniform(step.state);
    if (state == kEnd) break;
    const unsigned char* k_tile = smem + Smem::stages + ring.slot * Smem::kStage;
    float s[NI][4], ds[NI][4];
    uint32_t ds_operand[NI / 2][4];
    wgmma_fence();
    multiply_rows<T, kD, kRows>(s, q_rows, k_tile);
    wgmma_commit();
    wgmma_fence();
    multiply_rows<T, kD, kRows>(ds, grad_out_rows, k_tile + Smem::kTile);
    wgmma_commit();

    wgmma_wait<1>();
    accumulator_ready(s);
    if constexpr (!kCapped) a.problem.apply_sign(s);
    // s: from products to probabilities; with a cap, times its derivative.
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kCapped) {
          const Tanh score = a.problem.capped(s[ni][e]);
          s[ni][e] = exp2_fast(fmaf(score.value, a.problem.scale2, -lse2[e / 2])) * score.slope;
        } else {
          s[ni][e] = exp2_fast(fmaf(s[ni][e], a.problem.scale2, -lse2[e / 2]));
        }
      }
    }
    if (state == kPartial) {
      for_hidden<NI>(a.problem, row, step.first, [&](int ni, int e) { s[ni][e] = 0.f; });
    }
    wgmma_wait<0>();
    accumulator_ready(ds);
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[ni][e] = s[ni][e] * (ds[ni][e] - delta[e / 2]);
    }
    to_operand<T>(ds_operand, ds);
    wgmma_fence();
    multiply_tokens<T>(dq, ds_operand, k_tile);
    wgmma_commit();
    wgmma_wait<0>();
    accumulator_ready(dq);
    release(&tiles.empty[ring.slot]);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = own_query + 8 * r;
    if (query >= p.tq) continue;
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      store_pair(a.dq.row(query, head), no * 8 + fragment_column(0), p.d, dq[no][2 * r] * p.scale,
                 dq[no][2 * r + 1] * p.scale, a.dq.vectors);
    }
  }
}

}  // namespace
}  // namespace attention_sm90

void launch_attention_dq_sm90(const AttentionBwdArgs& args, void* stream) {
  using namespace attention_sm90;
  choose_sm90_kernel(args, [&](auto element, auto head_dim, auto capped) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value, kKeys = QueriesSmem<kD>::kKeys;
    constexpr bool kCapped = decltype(capped)::value;
    const QueriesParams<T> params{
        sm90_problem_of(args),     tokens_map(args.q, kRows), tokens_map(args.grad_out, kRows),
        tokens_map(args.k, kKeys), tokens_map(args.v, kKeys), args.lse.ptr<float>(),
        args.delta.ptr<float>(),   heads_of<T>(args.dq)};
    const AttentionProblem& p = params.problem.p;
    launch("attention_bwd_dq_sm90", attention_bwd_dq_sm90_kernel<T, kD, kCapped>,
           dim3((p.tq + kRows - 1) / kRows, p.heads), kThreads, QueriesSmem<kD>::bytes, stream, params);
  });
}

}  // namespace mmk::cuda
