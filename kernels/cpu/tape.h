// A divergence of one's own where there is no compiler: its operations one after the other, on a
// vector of entries each. The same numbers as compiled; 128 x 151,936 in bf16 take 7 times as long
// (a JSD, 2 cores of Zen 5, busy, 2026-11-28).
#pragma once

#include "elementwise.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// One step of a tape on what earlier ones left; masks are vectors of all bits or none.
template <class V>
FUSEDKD_INLINE V step(const TapeStep& s, const V* x, const Entry<V>& e, const double* w) {
  typedef typename Of<V>::I I;
  const V a = x[s.inputs[0]], b = x[s.inputs[1]];
  const I m = (I)a, n = (I)b;
  switch (s.op) {
    case TapeOp::lp: return e.lp;
    case TapeOp::lq: return e.lq;
    case TapeOp::p: return e.p;
    case TapeOp::q: return e.q;
    case TapeOp::gap: return e.gap;
    case TapeOp::constant: return splat<V>((typename Of<V>::F)s.number);
    case TapeOp::parameter: return splat<V>((typename Of<V>::F)w[(int)s.number]);
    case TapeOp::neg: return -a;
    case TapeOp::abs: return abs(a);
    case TapeOp::sign: return sign(a);
    case TapeOp::exp: return exp(a);
    case TapeOp::expm1: return expm1(a);
    case TapeOp::log: return log_of(a);
    case TapeOp::log1p: return log1p(a);
    case TapeOp::sqrt: return sqrt(a);
    case TapeOp::tanh: return tanh(a);
    case TapeOp::sigmoid: return sigmoid(a);
    case TapeOp::detach: return a;
    case TapeOp::add: return a + b;
    case TapeOp::sub: return a - b;
    case TapeOp::mul: return a * b;
    case TapeOp::div: return a / b;
    case TapeOp::pow: return pow(a, b);
    case TapeOp::minimum: return (a != a) | (b != b) ? a + b : min(a, b);
    case TapeOp::maximum: return (a != a) | (b != b) ? a + b : max(a, b);
    case TapeOp::logaddexp: return logaddexp(a, b);
    case TapeOp::where: return m ? b : x[s.inputs[2]];
    case TapeOp::eq: return (V)(I)(a == b);
    case TapeOp::lt: return (V)(I)(a < b);
    case TapeOp::le: return (V)(I)(a <= b);
    case TapeOp::both: return (V)(m & n);
    case TapeOp::either: return (V)(m | n);
    case TapeOp::no: return (V)~m;
  }
  return a;
}

template <class V>
FUSEDKD_INLINE void steps(const Tape& self, V* x, const Entry<V>& e, const double* w) {
  x[0] = V{};
  for (int64_t i = 0; i < self.count; ++i) x[i] = step(self.steps[i], x, e, w);
}

// Listed in pointwise.h. The tape's address is the last parameter: fusedkd.kernels.cpu.emit.
struct tape {
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    return run(e, w);
  }
  template <class V>
  static __attribute__((noinline)) Point<V> run(const Entry<V>& e, const double* w) {
    const Tape& self = *(const Tape*)(uintptr_t)w[kParameters - 1];
    V x[kMostSteps];
    steps(self, x, e, w);
    const V grad = x[self.grad];
    return {x[self.value], abs(grad) == splat<V>(kInfinity) ? V{} : grad};
  }
};

// A row rule: numbers of a row in the place of an entry's.
inline double rule_factor(const Tape& self, const RuleNumbers& numbers) {
  VD x[kMostSteps];
  steps(self, x, Entry<VD>{}, (const double*)&numbers);
  return x[self.value][0];
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
