// Attention backward. With p_ij = exp(s_ij - lse_i), delta_i = <grad_out_i, out_i> - grad_lse_i, and c_ij the
// derivative of s_ij by scale <q_i, k_j>: 1, or with a soft cap 1 - (s_ij / softcap)^2:
//   ds_ij = p_ij (<grad_out_i, v_j> - delta_i) c_ij
//   dv_j = sum_i p_ij grad_out_i    dk_j = scale sum_i ds_ij q_i    dq_i = scale sum_j ds_ij k_j
// Two kernels recompute p, one per key tile and one per query tile: every sum has one owner and a fixed order, so there
// are no atomics and results are bitwise reproducible.
#include "attention/attention_sm90.h"
#include "attention/attention_tile.h"

namespace mmk::cuda {
namespace {

template <class T>
struct BackwardParams {
  AttentionProblem p;
  Heads<const T> grad_out;          // [Tq, H, Dv]
  Heads<const T> q;                 // [Tq, H, D]
  Heads<const T> k;                 // [Tk, Hkv, D]
  Heads<const T> v;                 // [Tk, Hkv, Dv]
  const float* __restrict__ lse;    // [H, Tq]
  const float* __restrict__ delta;  // [H, Tq]
  // outputs
  Heads<T> dq;  // [Tq, H, D]
  Heads<T> dk;  // [Tk, Hkv, D]
  Heads<T> dv;  // [Tk, Hkv, Dv]
};

template <class T>
struct DeltaParams {
  int tq, heads, dv;
  Heads<const T> grad_out;             // [Tq, H, Dv]
  Heads<const T> out;                  // [Tq, H, Dv]
  const float* __restrict__ grad_lse;  // [H, Tq] or null
  // output
  float* __restrict__ delta;  // [H, Tq]
};

constexpr int kDeltaThreads = 128;

// A warp per (query, head); a head's queries are adjacent.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const __grid_constant__ DeltaParams<T> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= static_cast<int64_t>(a.tq) * a.heads) return;
  const int head = static_cast<int>(row / a.tq), query = static_cast<int>(row % a.tq);
  const T* grad_out = a.grad_out.row(query, head);
  const T* out = a.out.row(query, head);
  float sum = 0.f;
  for (int d = threadIdx.x % kWarp; d < a.dv; d += kWarp) sum = fmaf(to_float(grad_out[d]), to_float(out[d]), sum);
  sum = warp_reduce(sum, Sum{});
  if (threadIdx.x % kWarp == 0) a.delta[row] = sum - (a.grad_lse != nullptr ? a.grad_lse[row] : 0.f);
}

// Per-query inputs of the scores.
struct QueryStats {
  float lse, delta;
  int begin, end;  // keys that it sees
};

template <class T>
__device__ __forceinline__ QueryStats stats_of(const BackwardParams<T>& a, int head, int query) {
  const Interval seen = interval_of(a.p.lo, a.p.hi, query, a.p.tq, a.p.tk);
  const int64_t i = static_cast<int64_t>(head) * a.p.tq + query;
  const bool exists = query < a.p.tq;
  return {exists ? a.lse[i] : 0.f, exists ? a.delta[i] : 0.f, seen.begin, seen.end};
}

template <class T, int kD>
struct BackwardSmem {
  using Tile = BackwardTile<T, kD>;
  static constexpr int outer0 = 0;
  static constexpr int outer1 = outer0 + tile_bytes<T>(Tile::outer, kD);
  static constexpr int inner0 = outer1 + tile_bytes<T>(Tile::outer, kD);
  static constexpr int inner1 = inner0 + tile_bytes<T>(Tile::inner, kD);
  static constexpr int p = inner1 + tile_bytes<T>(Tile::inner, kD);  // float only: an accumulator as operand
  static constexpr int stats = p + (sizeof(T) == 4 ? tile_bytes<T>(Tile::outer, Tile::inner) : 0);
  static constexpr int bytes = stats + Tile::inner * static_cast<int>(sizeof(QueryStats));
};

// Grid (key tiles, key/value heads, parts of the head dim). A block owns `outer` keys of one head, a warp 16 of them
// with dK and dV in registers; it loops over the query tiles of the keys' hull, once per query head of the group.
// Everything is transposed, so that the accumulators of p and ds [keys, queries] are already A operands. A block
// accumulates at most 128 columns of dK and dV (registers): for D = 256 two blocks share a key tile and both compute
// the scores. Shared memory: K, V [outer, D] throughout, Q, grad_out [inner, D] and the queries' statistics; the next
// grad_out tile loads during the last product. 16-bit: 38, 54, 68 KB for D = 64, 128, 256; float: 61, 72, 68 KB.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(BackwardTile<T, kD>::outer * 2, 1)
    attention_bwd_dkdv_kernel(const __grid_constant__ BackwardParams<T> a) {
  using Tile = BackwardTile<T, kD>;
  using Smem = BackwardSmem<T, kD>;
  constexpr int kThreads = Tile::outer * 2, kLd = pitch<T>(kD), NI = Tile::inner / 8;
  constexpr int kPart = kD < 128 ? kD : 128, NO = kPart / 8;
  T* k_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::outer0);
  T* v_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::outer1);
  T* q_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::inner0);
  T* grad_out_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::inner1);
  QueryStats* stats = reinterpret_cast<QueryStats*>(dynamic_smem() + Smem::stats);

  const AttentionProblem& p = a.p;
  const int key0 = blockIdx.x * Tile::outer, head_kv = blockIdx.y, part0 = blockIdx.z * kPart;
  const int group = p.heads / p.heads_kv, warp_row = threadIdx.x / kWarp * 16;
  T* scratch = reinterpret_cast<T*>(dynamic_smem() + Smem::p) + warp_row * pitch<T>(Tile::inner);
  const Hull hull = hull_of<Tile::outer>(p.first_q, p.last_q, key0, p.tk, p.tq);
  const int tiles = hull.begin < hull.end ? (hull.end - hull.begin + Tile::inner - 1) / Tile::inner : 0;
  const int depth = (p.d + 15) / 16 * 16, depth_v = (p.dv + 15) / 16 * 16;

  const auto load_queries = [&](int step, bool grad) {
    const int head = head_kv * group + step / tiles, query0 = hull.begin + step % tiles * Tile::inner;
    if (grad) {
      load_tile<Tile::inner, kD, kThreads>(grad_out_tile, a.grad_out.rows(head, hull.end, p.dv), query0, 0);
    } else {
      load_tile<Tile::inner, kD, kThreads>(q_tile, a.q.rows(head, hull.end, p.d), query0, 0);
    }
  };

  float dk[1][NO][4], dv[1][NO][4];
  clear(dk);
  clear(dv);
  if (tiles > 0) {
    load_tile<Tile::outer, kD, kThreads>(k_tile, a.k.rows(head_kv, p.tk, p.d), key0, 0);
    load_tile<Tile::outer, kD, kThreads>(v_tile, a.v.rows(head_kv, p.tk, p.dv), key0, 0);
    load_queries(0, true);
    load_queries(0, false);
    cp_async_commit();
  }
  for (int step = 0; step < tiles * group; ++step) {
    const int head = head_kv * group + step / tiles, query0 = hull.begin + step % tiles * Tile::inner;
    for (int i = threadIdx.x; i < Tile::inner; i += kThreads) {
      // A query past the hull has no rows in the tiles, so it must see nothing.
      stats[i] = query0 + i < hull.end ? stats_of(a, head, query0 + i) : QueryStats{0.f, 0.f, 0, 0};
    }
    cp_async_wait<0>();
    __syncthreads();

    float s[1][NI][4], ds[1][NI][4];
    clear(s);
    clear(ds);
    warp_gemm<Major::k, Major::k>(s, k_tile + warp_row * kLd, kLd, q_tile, kLd, depth);
    warp_gemm<Major::k, Major::k>(ds, v_tile + warp_row * kLd, kLd, grad_out_tile, kLd, depth_v);
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const QueryStats query = stats[ni * 8 + fragment_column(c)];
#pragma unroll
        for (int e = c; e < 4; e += 2) {
          const int key = key0 + warp_row + fragment_row(e);
          const bool visible = key >= query.begin && key < query.end;
          const Logit x = logit<kCapped>(p, s[0][ni][e]);
          s[0][ni][e] = visible ? exp_of<T>(__fsub_rn(x.value, query.lse)) : 0.f;
          ds[0][ni][e] = visible ? s[0][ni][e] * (ds[0][ni][e] - query.delta) * x.slope : 0.f;
        }
      }
    }
    warp_gemm_from_accumulator<Major::outer>(dv, s, grad_out_tile + part0, kLd, scratch);
    __syncthreads();
    const bool more = step + 1 < tiles * group;
    if (more) load_queries(step + 1, true);
    cp_async_commit();
    warp_gemm_from_accumulator<Major::outer>(dk, ds, q_tile + part0, kLd, scratch);
    __syncthreads();
    if (more) load_queries(step + 1, false);
    cp_async_commit();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = key0 + warp_row + fragment_row(2 * r);
    if (key >= p.tk) continue;
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      const int column = part0 + no * 8 + fragment_column(0);
      store_pair(a.dk.row(key, head_kv), column, p.d, dk[0][no][2 * r] * p.scale, dk[0][no][2 * r + 1] * p.scale,
                 a.dk.vectors);
      store_pair(a.dv.row(key, head_kv), column, p.dv, dv[0][no][2 * r], dv[0][no][2 * r + 1], a.dv.vectors);
    }
  }
}

// Grid (query tiles, heads). A block owns `outer` queries of one head, a warp 16 of them with dQ in registers; it loops
// over the key tiles of the rows' hull and masks only tiles that some row sees partially.
// Shared memory: Q, grad_out [outer, D] throughout, K, V [inner, D]; the next V tile loads during the last product.
// Same budget as the dK, dV kernel.
template <class T, int kD, bool kCapped>
__global__ void __launch_bounds__(BackwardTile<T, kD>::outer * 2, 1)
    attention_bwd_dq_kernel(const __grid_constant__ BackwardParams<T> a) {
  using Tile = BackwardTile<T, kD>;
  using Smem = BackwardSmem<T, kD>;
  constexpr int kThreads = Tile::outer * 2, kLd = pitch<T>(kD), NI = Tile::inner / 8, NO = kD / 8;
  T* q_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::outer0);
  T* grad_out_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::outer1);
  T* k_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::inner0);
  T* v_tile = reinterpret_cast<T*>(dynamic_smem() + Smem::inner1);

  const AttentionProblem& p = a.p;
  const int query0 = blockIdx.x * Tile::outer, head = blockIdx.y, head_kv = head / (p.heads / p.heads_kv);
  const int warp_row = threadIdx.x / kWarp * 16;
  T* scratch = reinterpret_cast<T*>(dynamic_smem() + Smem::p) + warp_row * pitch<T>(Tile::inner);
  const Hull hull = hull_of<Tile::outer>(p.lo, p.hi, query0, p.tq, p.tk);
  const int depth = (p.d + 15) / 16 * 16, depth_v = (p.dv + 15) / 16 * 16;
  const auto k = a.k.rows(head_kv, hull.end, p.d), v = a.v.rows(head_kv, hull.end, p.dv);

  QueryStats query[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) query[r] = stats_of(a, head, query0 + warp_row + fragment_row(2 * r));
  float dq[1][NO][4];
  clear(dq);
  if (hull.begin < hull.end) {
    load_tile<Tile::outer, kD, kThreads>(q_tile, a.q.rows(head, p.tq, p.d), query0, 0);
    load_tile<Tile::outer, kD, kThreads>(grad_out_tile, a.grad_out.rows(head, p.tq, p.dv), query0, 0);
    load_tile<Tile::inner, kD, kThreads>(k_tile, k, hull.begin, 0);
    load_tile<Tile::inner, kD, kThreads>(v_tile, v, hull.begin, 0);
    cp_async_commit();
  }
  for (int key0 = hull.begin; key0 < hull.end; key0 += Tile::inner) {
    const bool more = key0 + Tile::inner < hull.end;
    cp_async_wait<0>();
    __syncthreads();
    float s[1][NI][4], ds[1][NI][4];
    clear(s);
    clear(ds);
    warp_gemm<Major::k, Major::k>(s, q_tile + warp_row * kLd, kLd, k_tile, kLd, depth);
    warp_gemm<Major::k, Major::k>(ds, grad_out_tile + warp_row * kLd, kLd, v_tile, kLd, depth_v);
    __syncthreads();
    if (more) load_tile<Tile::inner, kD, kThreads>(v_tile, v, key0 + Tile::inner, 0);
    cp_async_commit();

    const bool mask = key0 < hull.all_begin || key0 + Tile::inner > hull.all_end;
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = key0 + ni * 8 + fragment_column(e);
        const bool visible = !mask || (key >= query[e / 2].begin && key < query[e / 2].end);
        const Logit x = logit<kCapped>(p, s[0][ni][e]);
        const float probability = exp_of<T>(__fsub_rn(x.value, query[e / 2].lse));
        ds[0][ni][e] = visible ? probability * (ds[0][ni][e] - query[e / 2].delta) * x.slope : 0.f;
      }
    }
    warp_gemm_from_accumulator<Major::outer>(dq, ds, k_tile, kLd, scratch);
    __syncthreads();
    if (more) load_tile<Tile::inner, kD, kThreads>(k_tile, k, key0 + Tile::inner, 0);
    cp_async_commit();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = query0 + warp_row + fragment_row(2 * r);
    if (row >= p.tq) continue;
#pragma unroll
    for (int no = 0; no < NO; ++no) {
      store_pair(a.dq.row(row, head), no * 8 + fragment_column(0), p.d, dq[0][no][2 * r] * p.scale,
                 dq[0][no][2 * r + 1] * p.scale, a.dq.vectors);
    }
  }
}

}  // namespace
}  // namespace mmk::cuda

namespace mmk {

void launch_attention_bwd_cuda(const AttentionBwdArgs& args, void* stream) {
  const cuda::DeviceGuard guard(args.q);
  const bool sm90 = cuda::use_attention_sm90(args.grad_out, args.q, args.k, args.v);
  if (!sm90) cuda::expect_no_pattern(args);
  cuda::choose_attention_kernel(args, [&](auto element, auto head_dim, auto capped) {
    using T = decltype(element);
    constexpr int kD = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    using Tile = cuda::BackwardTile<T, kD>;
    constexpr int kBytes = cuda::BackwardSmem<T, kD>::bytes, kParts = kD > 128 ? kD / 128 : 1;
    const cuda::AttentionProblem p = cuda::problem_of(args);

    const cuda::DeltaParams<T> delta{p.tq,
                                     p.heads,
                                     p.dv,
                                     cuda::heads_of<const T>(args.grad_out),
                                     cuda::heads_of<const T>(args.out),
                                     args.grad_lse.ptr<float>(),
                                     args.delta.ptr<float>()};
    constexpr int kRowsPerBlock = cuda::kDeltaThreads / cuda::kWarp;
    const int64_t rows = static_cast<int64_t>(p.tq) * p.heads;
    cuda::launch("attention_delta", cuda::attention_delta_kernel<T>,
                 dim3(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock)), cuda::kDeltaThreads, 0,
                 stream, delta);
    if constexpr (cuda::kHaveSm90) {
      if (sm90) {
        cuda::launch_attention_dkdv_sm90(args, stream);
        return cuda::launch_attention_dq_sm90(args, stream);
      }
    }

    const cuda::BackwardParams<T> params{p,
                                         cuda::heads_of<const T>(args.grad_out),
                                         cuda::heads_of<const T>(args.q),
                                         cuda::heads_of<const T>(args.k),
                                         cuda::heads_of<const T>(args.v),
                                         args.lse.ptr<float>(),
                                         args.delta.ptr<float>(),
                                         cuda::heads_of<T>(args.dq),
                                         cuda::heads_of<T>(args.dk),
                                         cuda::heads_of<T>(args.dv)};
    cuda::launch("attention_bwd_dkdv", cuda::attention_bwd_dkdv_kernel<T, kD, kCapped>,
                 dim3((p.tk + Tile::outer - 1) / Tile::outer, p.heads_kv, kParts), Tile::outer * 2, kBytes, stream,
                 params);
    cuda::launch("attention_bwd_dq", cuda::attention_bwd_dq_kernel<T, kD, kCapped>,
                 dim3((p.tq + Tile::outer - 1) / Tile::outer, p.heads), Tile::outer * 2, kBytes, stream, params);
  });
}

}  // namespace mmk
