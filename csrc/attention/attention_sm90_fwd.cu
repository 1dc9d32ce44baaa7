// Attention forward for sm_90a: out_i = sum_j exp(s_ij - lse_i) v_j over the keys that query i sees, with s_ij =
// scale <q_i, k_j> or softcap tanh(scale <q_i, k_j> / softcap).
#include "attention/attention_sm90_tile.h"

namespace mmk::cuda {
namespace attention_sm90 {
namespace {

constexpr int kKeys = 128;  // per tile
constexpr int kNI = kKeys / 8;

template <class T>
struct ForwardParams {
  Sm90Problem problem;
  TensorMap q, k, v;  // boxes of [kRows, 64], [kKeys, 64]
  // outputs
  Heads<T> out;             // [Tq, H, Dv]
  float* __restrict__ lse;  // [H, Tq] natural log
};

// K and V have separate rings, because the softmax is between their products.
template <int kD>
struct ForwardSmem {
  static constexpr int kStages = kD == 64 ? 4 : 2;
  static constexpr int kTile = kTileBytes<kKeys, kD>;
  static constexpr int q = 0, k = q + kTileBytes<kRows, kD>, v = k + kStages * kTile, barriers = v + kStages * kTile;
  static constexpr int bytes = kSwizzleTile + barriers + 2 * static_cast<int>(sizeof(Barriers<kStages>));
  static_assert(bytes <= 227 * 1024, "what a block may have");
};

// The two consumers alternate on the tensor cores: while one does its softmax the other multiplies.
struct Turns {
  static constexpr int kBarrier = 1;
  int index;  // this consumer's

  __device__ __forceinline__ explicit Turns(int consumer) : index(consumer) {
    if (index == 1) named_arrive(kBarrier, 2 * kWarpgroup);  // let the first start
  }
  __device__ __forceinline__ void wait() const { named_sync(kBarrier + index, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { named_arrive(kBarrier + (index ^ 1), 2 * kWarpgroup); }
  // Balances the barrier after equal numbers of turns: consumes the second's last arrival.
  __device__ __forceinline__ void finish() const {
    if (index == 0) wait();
  }
};

// One step of the online softmax: turns scores [64, 8 kNI] into probabilities relative to the new maximum. m and l
// belong to this thread's two rows: m is the row's maximum, l this thread's share of the sum. Earlier results must be
// multiplied by `correction`.
__device__ __forceinline__ void softmax_step(float (&s)[kNI][4], float scale2, float (&m)[2], float (&l)[2],
                                             float (&correction)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = m[r];
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) top = fmaxf(top, fmaxf(s[ni][2 * r], s[ni][2 * r + 1]));
    top = lanes_reduce<1, 2>(top, Max{});
    const float base = top == -INFINITY ? 0.f : top * scale2;  // a row that has seen no key yet: 2^(-inf - 0) = 0
    correction[r] = exp2_fast(fmaf(m[r], scale2, -base));
    m[r] = top;
    float sum = 0.f;
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[ni][e] = exp2_fast(fmaf(s[ni][e], scale2, -base));
        sum += s[ni][e];
      }
    }
    l[r] = l[r] * correction[r] + sum;
  }
}

template <int NO>
__device__ __forceinline__ void scale_rows(float (&out)[NO][4], const float (&factor)[2]) {
#pragma unroll
  for (int no = 0; no < NO; ++no) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[no][e] *= factor[e / 2];
  }
}

template <class T, int kD>
__device__ __forceinline__ void produce(const ForwardParams<T>& a, unsigned char* smem,
                                        Barriers<ForwardSmem<kD>::kStages>* rings, int query0, int head) {
  using Smem = ForwardSmem<kD>;
  auto &keys = rings[0], &values = rings[1];
  const int head_kv = head / (a.problem.p.heads / a.problem.p.heads_kv);
  const bool leads = threadIdx.x == 0;
  Ring<Smem::kStages> ring;
  if (leads) {
    barrier_arrive_expect(&keys.fixed, kTileBytes<kRows, kD>);
    fetch<kRows, kD>(smem + Smem::q, a.q, &keys.fixed, query0, head);
  }
  for_key_tiles<kKeys>(a.problem, query0, [&](int key0, int state) {
    if (leads) {
      barrier_wait(&keys.empty[ring.slot], ring.parity ^ 1);
      keys.steps[ring.slot] = {key0, state};
      barrier_arrive_expect(&keys.full[ring.slot], Smem::kTile);
      fetch<kKeys, kD>(smem + Smem::k + ring.slot * Smem::kTile, a.k, &keys.full[ring.slot], key0, head_kv);
      barrier_wait(&values.empty[ring.slot], ring.parity ^ 1);
      barrier_arrive_expect(&values.full[ring.slot], Smem::kTile);
      fetch<kKeys, kD>(smem + Smem::v + ring.slot * Smem::kTile, a.v, &values.full[ring.slot], key0, head_kv);
    }
    ring.next();
  });
  if (leads) {
    barrier_wait(&keys.empty[ring.slot], ring.parity ^ 1);
    keys.steps[ring.slot] = {0, kEnd};
    barrier_arrive(&keys.full[ring.slot]);
  }
}

// Grid (query tiles, heads): a block owns 128 queries of one head. The last queries are scheduled first, because they
// see the most keys of a causal mask. A producer and two consumer warpgroups of 64 queries each, with outputs and
// softmax statistics in registers: 64 for scores, 32 for probabilities and kD / 2 for outputs. The product of one
// tile's probabilities with V and the next tile's score product run concurrently, during that tile's softmax.
// Shared memory: Q [128, kD] throughout, two (kD = 128) or four stages of K and of V [128, kD]: 160 or 144 KB.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1) attention_fwd_sm90_kernel(const __grid_constant__ ForwardParams<T> a) {
  using Smem = ForwardSmem<kD>;
  constexpr int NO = kD / 8;
  unsigned char* smem = aligned_smem();
  auto* rings = reinterpret_cast<Barriers<Smem::kStages>*>(smem + Smem::barriers);
  auto &keys = rings[0], &values = rings[1];
  keys.init(1);
  values.init(1);
  const AttentionProblem& p = a.problem.p;
  const int query0 = (gridDim.x - 1 - blockIdx.x) * kRows, head = blockIdx.y;
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarp) produce<T, kD>(a, smem, rings, query0, head);
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = warp_uniform(threadIdx.x / kWarpgroup - 1);
  const int own_query = query0 + consumer * 64 + threadIdx.x % kWarpgroup / kWarp * 16 + fragment_row(0);
  const unsigned char* q_rows = smem + Smem::q + consumer * 64 * kSwizzleRow;
  const Sight row[2] = {Sight(a.problem, own_query), Sight(a.problem, own_query + 8)};
  const Turns turns(consumer);
  Ring<Smem::kStages> k_ring, v_ring;
  float s[kNI][4], out[NO][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, correction[2];
  uint32_t probabilities[kKeys / 16][4];

  const auto next_step = [&] {
    barrier_wait(&keys.full[k_ring.slot], k_ring.parity);
    const Step step = keys.steps[k_ring.slot];
    return Step{step.first, warp_uniform(step.state)};
  };
  const auto multiply_scores = [&] {
    wgmma_fence();
    multiply_rows<T, kD, kRows>(s, q_rows, smem + Smem::k + k_ring.slot * Smem::kTile);
    wgmma_commit();
  };
  const auto multiply_values = [&] {
    barrier_wait(&values.full[v_ring.slot], v_ring.parity);
    wgmma_fence();
    multiply_tokens<T>(out, probabilities, smem + Smem::v + v_ring.slot * Smem::kTile);
    wgmma_commit();
  };
  const auto soften = [&](const Step& step) {
    accumulator_ready(s);
    release(&keys.empty[k_ring.slot]);
    k_ring.next();
    if constexpr (kCapped) {
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[ni][e] = a.problem.capped(s[ni][e]).value;
      }
    } else {
      a.problem.apply_sign(s);
    }
    if (step.state == kPartial) {
      for_hidden<kNI>(a.problem, row, step.first, [&](int ni, int e) { s[ni][e] = -INFINITY; });
    }
    softmax_step(s, a.problem.scale2, m, l, correction);
  };

  Step step = next_step();
  if (step.state != kEnd) {
    barrier_wait(&keys.fixed, 0);
    turns.wait();
    multiply_scores();
    turns.pass();
    wgmma_wait<0>();
    soften(step);
    to_operand<T>(probabilities, s);
    for (step = next_step(); step.state != kEnd; step = next_step()) {
      turns.wait();
      multiply_scores();
      multiply_values();
      turns.pass();
      wgmma_wait<1>();
      soften(step);
      wgmma_wait<0>();
      accumulator_ready(out);
      release(&values.empty[v_ring.slot]);
      v_ring.next();
      scale_rows(out, correction);
      to_operand<T>(probabilities, s);
    }
    multiply_values();
    wgmma_wait<0>();
    accumulator_ready(out);
  }
  turns.finish();

  float total[2], inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = lanes_reduce<1, 2>(l[r], Sum{});
    inverse[r] = total[r] == 0.f ? 0.f : 1.f / total[r];
  }
  scale_rows(out, inverse);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = own_query + 8 * r;
    if (query >= p.tq) continue;
    T* target = a.out.row(query, head);
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      store_pair(target, no * 8 + fragment_column(0), p.dv, out[no][2 * r], out[no][2 * r + 1], a.out.vectors);
    }
    if (threadIdx.x % 4 == 0) {
      a.lse[static_cast<int64_t>(head) * p.tq + query] =
          total[r] == 0.f ? -INFINITY : fmaf(m[r], a.problem.scale2 / kLog2E, logf(total[r]));
    }
  }
}

}  // namespace
}  // namespace attention_sm90

void launch_attention_fwd_sm90(const AttentionFwdArgs& args, void* stream) {
  using namespace attention_sm90;
  choose_sm90_kernel(args, [&](auto element, auto head_dim, auto capped) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    const ForwardParams<T> params{sm90_problem_of(args),     tokens_map(args.q, kRows), tokens_map(args.k, kKeys),
                                  tokens_map(args.v, kKeys), heads_of<T>(args.out),     args.lse.ptr<float>()};
    const dim3 grid((params.problem.p.tq + kRows - 1) / kRows, params.problem.p.heads);
    launch("attention_fwd_sm90", attention_fwd_sm90_kernel<T, kD, kCapped>, grid, kThreads, ForwardSmem<kD>::bytes,
           stream, params);
  });
}

}  // namespace mmk::cuda
