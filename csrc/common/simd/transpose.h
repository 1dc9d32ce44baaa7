// In-register transpose of a square of lanes, for packing sources of the other order.
#pragma once

#include <utility>

#include "common/simd/vec.h"

namespace mmk {
namespace MMK_ISA {

// One exchange of the recursive transpose: rows `step` apart swap the off-diagonal blocks of width `step`.
template <int kStep, class E, int... j>
MMK_INLINE void exchange(Vec<E>& upper, Vec<E>& lower, std::integer_sequence<int, j...>) {
  constexpr int L = kLanes<E>;
  const Vec<E> a = upper, b = lower;
#if defined(__clang__) || __GNUC__ >= 12
  upper = __builtin_shufflevector(a, b, ((j & kStep) ? L + j - kStep : j)...);
  lower = __builtin_shufflevector(a, b, ((j & kStep) ? L + j : j + kStep)...);
#else
  using Index = decltype(a == b);
  upper = __builtin_shuffle(a, b, Index{((j & kStep) ? L + j - kStep : j)...});
  lower = __builtin_shuffle(a, b, Index{((j & kStep) ? L + j : j + kStep)...});
#endif
}

template <int kStep, class E>
MMK_INLINE void transpose_from(Vec<E> (&r)[kLanes<E>]) {
  constexpr int L = kLanes<E>;
  if constexpr (kStep < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if ((i & kStep) == 0) exchange<kStep, E>(r[i], r[i + kStep], std::make_integer_sequence<int, L>());
    transpose_from<2 * kStep, E>(r);
  }
}

// r[i][j] <-> r[j][i]
template <class E>
MMK_INLINE void transpose(Vec<E> (&r)[kLanes<E>]) {
  transpose_from<1, E>(r);
}

}  // namespace MMK_ISA
}  // namespace mmk
