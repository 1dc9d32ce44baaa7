// What happens to a tile of scores before pattern and bias: scale and soft cap.
//
//   s_ij = scale <q_i, k_j>, or with a cap  cap tanh(scale <q_i, k_j> / cap), whose derivative is 1 - tanh^2
#pragma once

#include "attention/attention_cpu_extras.h"

namespace mmk {
namespace MMK_ISA {

// The soft cap of a call.
template <class C>
class SoftCap {
 public:
  SoftCap(const AttentionExtras& extras, double scale)
      : given_(extras.softcap > 0),
        cap_(static_cast<C>(extras.softcap)),
        inner_(given_ ? static_cast<C>(scale / extras.softcap) : C{0}) {}
  bool given() const { return given_; }

  // Products [rows, columns] become capped scores, in place; `slope`, if given, receives the derivatives. Rows are ld
  // apart and padded to whole vectors.
  void apply(C* s, C* slope, int64_t rows, int64_t columns, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = i * ld; j < i * ld + columns; j += kLanes<C>) {
        Vec<C> derivative;
        store(s + j, tanh(load(s + j) * inner_, derivative) * cap_);
        if (slope != nullptr) store(slope + j, derivative);
      }
  }

 private:
  const bool given_;
  const C cap_, inner_;
};

}  // namespace MMK_ISA
}  // namespace mmk
