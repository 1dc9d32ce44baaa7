// Backward on the CPU.
//
//   P_ij = exp(scale <q_i, k_j> - lse_i)      dP_ij = <do_i, v_j>      dS_ij = P_ij (dP_ij - delta_i)
//   dV = P^T dO      dK = scale dS^T Q      dQ = scale dS K      delta_i = <do_i, out_i> - dlse_i
//
// Where all keys of a query tile lie in one key tile, rows of P are divided by their sum and delta is sum_j P_ij dP_ij,
// which replaces <do_i, out_i>: the rounding of lse and out does not enter, and a query with a single key gets dS = 0
// exactly. Elsewhere delta comes from out, and dQ is corrected afterwards (MeanKeys).
//
// S and dP use 16-bit inputs directly. P and dS are operands of type S: the compute type, which makes a bf16 gradient
// as accurate as a float32 one that was cast; or, where more than three quarters of all pairs are computed, bf16, which
// halves the cost of three products at sqrt(2) times the error.
//
// Tiles are computed transposed, keys down and queries across: P^T and dS^T then go straight into the packed layout of
// the left operands of dV and dK, and lse, delta and the intervals are vectors along a row. dS is packed once more for
// dQ. The sums are in the compute type and are cast once.
//
// No sum is shared between threads, so there are two ways to split the work:
//   one pass    a task owns a component (tiles and keys that only see each other) of a key/value head: five products
//   two passes  tasks that own queries for dQ, then tasks that own keys for dK and dV: seven products; when there are
//               too few components to keep every thread busy
#pragma once

#include "attention/attention_cpu_bwd_task.h"

namespace mmk {
namespace MMK_ISA {

template <class T, class S, bool want_dq, bool want_dkv>
void run_backward(const AttentionBwdArgs& args, const AttentionShape& shape, const AttentionPlan& plan,
                  int num_threads) {
  const int64_t group = want_dkv ? shape.group() : 1, units = shape.heads / group;
  const int64_t tasks = plan.num_tasks() * units, key_range = want_dkv ? plan.longest_key_range() : 0;
  Arena measure(nullptr);
  const BackwardScratch<T, S> sizes(measure, shape, args.extras, key_range);
  AlignedBuffer<char> memory(measure.used() * usable_threads(tasks, num_threads));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    Arena arena(memory.data() + thread * measure.used());
    const BackwardScratch<T, S> scratch(arena, shape, args.extras, key_range);
    const int64_t head = task % units * group;
    BackwardTask<T, S, want_dq, want_dkv>(args, shape, plan.tiles(), plan.tasks()[task / units], scratch)
        .run(head, head + group);
  });
}

template <class T, class S>
void backward_as(const AttentionBwdArgs& args, const AttentionShape& shape, AttentionPlan& plan, int num_threads) {
  plan.cut_components();
  if (plan.balanced(shape.kv_heads, num_threads, 7.0 / 5.0)) {
    run_backward<T, S, true, true>(args, shape, plan, num_threads);
    return;
  }
  plan.cut_queries(tiles_per_task(plan.num_tiles(), shape.heads, num_threads));
  run_backward<T, S, true, false>(args, shape, plan, num_threads);
  plan.cut_keys(2 * kGradientKeyTile);
  run_backward<T, S, false, true>(args, shape, plan, num_threads);
}

template <class T>
void backward(const AttentionBwdArgs& args, int num_threads) {
  const AttentionShape shape(args);
  AttentionPlan plan(args.mask.lo.ptr<int32_t>(), args.mask.hi.ptr<int32_t>(), shape.num_queries, shape.num_keys);
  if constexpr (kWordElements<T> > 1)
    if (4 * plan.num_pairs() > 3 * shape.num_queries * shape.num_keys)
      return backward_as<T, T>(args, shape, plan, num_threads);
  backward_as<T, ComputeOf<T>>(args, shape, plan, num_threads);
}

}  // namespace MMK_ISA
}  // namespace mmk
