// Attention forward: out_i = sum_j exp(s_ij - lse_i) v_j over the keys lo[i] <= j < hi[i], with s_ij = scale <q_i, k_j>
// or softcap tanh(scale <q_i, k_j> / softcap).
#include "attention/attention_sm90.h"
#include "attention/attention_tile.h"

namespace mmk::cuda {
namespace {

template <class T>
struct ForwardParams {
  AttentionProblem p;
  Heads<const T> q;  // [Tq, H, D]
  Heads<const T> k;  // [Tk, Hkv, D]
  Heads<const T> v;  // [Tk, Hkv, Dv]
  // outputs
  Heads<T> out;             // [Tq, H, Dv]
  float* __restrict__ lse;  // [H, Tq] natural log
};

// One step of the online softmax: turns a warp's scores s [16, 8 NI] into probabilities relative to the new maximum. m
// and l belong to this thread's two rows: m is the row's maximum, l this thread's share of the sum.
template <class T, int NI, int NO>
__device__ __forceinline__ void softmax_step(float (&s)[1][NI][4], float (&m)[2], float (&l)[2],
                                             float (&out)[1][NO][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = m[r];
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) top = fmaxf(top, fmaxf(s[0][ni][2 * r], s[0][ni][2 * r + 1]));
    top = lanes_reduce<1, 2>(top, Max{});
    const float base = top == -INFINITY ? 0.f : top;  // a row that has seen no key yet: exp(-inf - 0) = 0
    const float correction = exp_of<T>(m[r] - base);
    m[r] = top;
    float sum = 0.f;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[0][ni][e] = exp_of<T>(__fsub_rn(s[0][ni][e], base));
        sum += s[0][ni][e];
      }
    }
    l[r] = l[r] * correction + sum;
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      out[0][no][2 * r] *= correction;
      out[0][no][2 * r + 1] *= correction;
    }
  }
}

template <class T, int kD>
struct ForwardSmem {
  using Tile = ForwardTile<T, kD>;
  static constexpr int q = 0;
  static constexpr int k = q + tile_bytes<T>(Tile::outer, kD);
  static constexpr int v = k + tile_bytes<T>(Tile::inner, kD);
  static constexpr int p = v + tile_bytes<T>(Tile::inner, kD);  // float only: probabilities as operand
  static constexpr int bytes = p + (sizeof(T) == 4 ? tile_bytes<T>(Tile::outer, Tile::inner) : 0);
};

// Grid (query tiles, heads). A block owns `outer` queries of one head, a warp 16 of them with their outputs and softmax
// statistics in registers; the block loops over the key tiles of the hull of its rows' intervals and masks only tiles
// that some row sees partially.
// Shared memory: Q [outer, D] throughout, one tile each of K and V [inner, D]; while one is used the other loads.
// 16-bit: 27, 52, 68 KB for D = 64, 128, 256; float: 70, 77, 70 KB.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(ForwardTile<T, kD>::outer * 2, 1)
    attention_fwd_kernel(const __grid_constant__ ForwardParams<T> a) {
  using Tile = ForwardTile<T, kD>;
  using Smem = ForwardSmem<T, kD>;
  constexpr int kThreads = Tile::outer * 2, kLd = pitch<T>(kD), NI = Tile::inner / 8, NO = kD / 8;
  T* q_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::q);
  T* k_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::k);
  T* v_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::v);

  const AttentionProblem& p = a.p;
  const int query0 = blockIdx.x * Tile::outer, head = blockIdx.y, head_kv = head / (p.heads / p.heads_kv);
  const int warp_row = threadIdx.x / kWarp * 16;
  T* scratch = reinterpret_cast<T*>(dynamic_smem() + Smem::p) + warp_row * pitch<T>(Tile::inner);
  const Hull hull = hull_of<Tile::outer>(p.lo, p.hi, query0, p.tq, p.tk);
  const int depth = (p.d + 15) / 16 * 16;

  Interval seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    seen[r] = interval_of(p.lo, p.hi, query0 + warp_row + fragment_row(2 * r), p.tq, p.tk);
  }
  float out[1][NO][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  clear(out);

  const auto q = a.q.rows(head, p.tq, p.d);
  const auto k = a.k.rows(head_kv, hull.end, p.d), v = a.v.rows(head_kv, hull.end, p.dv);
  if (hull.begin < hull.end) {
    load_tile<Tile::outer, kD, kThreads>(q_tile, q, query0, 0);
    load_tile<Tile::inner, kD, kThreads>(k_tile, k, hull.begin, 0);
    cp_async_commit();
    load_tile<Tile::inner, kD, kThreads>(v_tile, v, hull.begin, 0);
    cp_async_commit();
  }
  for (int key0 = hull.begin; key0 < hull.end; key0 += Tile::inner) {
    const bool more = key0 + Tile::inner < hull.end;
    cp_async_wait<1>();
    __syncthreads();
    float s[1][NI][4];
    clear(s);
    warp_gemm<Major::k, Major::k>(s, q_tile + warp_row * kLd, kLd, k_tile, kLd, depth);
    __syncthreads();
    if (more) load_tile<Tile::inner, kD, kThreads>(k_tile, k, key0 + Tile::inner, 0);
    cp_async_commit();

    const bool mask = key0 < hull.all_begin || key0 + Tile::inner > hull.all_end;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = key0 + ni * 8 + fragment_column(e);
        const bool visible = !mask || (key >= seen[e / 2].begin && key < seen[e / 2].end);
        s[0][ni][e] = visible ? logit<kCapped>(p, s[0][ni][e]).value : -INFINITY;
      }
    }
    softmax_step<T>(s, m, l, out);

    cp_async_wait<1>();
    __syncthreads();
    warp_gemm_from_accumulator<Major::outer>(out, s, v_tile, kLd, scratch);
    __syncthreads();
    if (more) load_tile<Tile::inner, kD, kThreads>(v_tile, v, key0 + Tile::inner, 0);
    cp_async_commit();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = query0 + warp_row + fragment_row(2 * r);
    const float total = lanes_reduce<1, 2>(l[r], Sum{});
    if (query >= p.tq) continue;
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    T* row = a.out.row(query, head);
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      store_pair(row, no * 8 + fragment_column(0), p.dv, out[0][no][2 * r] * inverse, out[0][no][2 * r + 1] * inverse,
                 a.out.vectors);
    }
    if (threadIdx.x % 4 == 0) {
      a.lse[static_cast<int64_t>(head) * p.tq + query] = total == 0.f ? -INFINITY : m[r] + logf(total);
    }
  }
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

void launch_attention_fwd_cuda(const AttentionFwdArgs& args, void* stream) {
  const cuda::DeviceGuard guard(args.q);
  if constexpr (cuda::kHaveSm90) {
    if (cuda::use_attention_sm90(args.q, args.k, args.v)) return cuda::launch_attention_fwd_sm90(args, stream);
  }
  cuda::expect_no_pattern(args);
  cuda::choose_attention_kernel(args, [&](auto element, auto head_dim, auto capped) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    constexpr int kRows = cuda::ForwardTile<T, kD>::outer;
    const cuda::ForwardParams<T> params{cuda::problem_of(args),          cuda::heads_of<const T>(args.q),
                                        cuda::heads_of<const T>(args.k), cuda::heads_of<const T>(args.v),
                                        cuda::heads_of<T>(args.out),     args.lse.ptr<float>()};
    const dim3 grid((params.p.tq + kRows - 1) / kRows, params.p.heads);
    cuda::launch("attention_fwd", cuda::attention_fwd_kernel<T, kD, kCapped>, grid, kRows * 2,
                 cuda::ForwardSmem<T, kD>::bytes, stream, params);
  });
}

}  // namespace mmk
