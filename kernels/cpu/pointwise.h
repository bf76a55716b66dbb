// The divergences, entry by entry. A new one is one struct here, listed by FUSEDKD_DIVERGENCE, one
// factory in fusedkd/divergences.py, one function in kernels/triton/pointwise.py, and no edit
// anywhere else. Formulas and edges: fusedkd/divergences.py. A struct has either
//
//   static Point<V> at(const Entry<V>&, const double* w): value and gradient = d value / d lq of
//     one entry, a total function (any of lp, lq may be -inf, gap then +-inf, 0 where both are), w
//     the divergence's parameters;
//
// or
//
//   static KlWeights kl(const double* w): it is a mix of the two KLs, whose sums of gradients are
//     known in advance and which therefore need one sweep less.
//
// A divergence whose gradient has a part in proportion to q where p / q -> 0 may leave that out
// where Entry::apart is set, and says so: static constexpr bool kHeedsApart = true. V is a vector
// of float or double. Write scalars as splat<V>(x); exp, log, mul0, abs, max, min come from vec.h.
#pragma once

#include "vec.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

template <class V> struct Entry {
  V lp, lq;  // log-probabilities of teacher and student
  V gap;     // lp - lq, free of the cancellation that subtracting them would bring
  V p, q;
  V ratio;  // the smaller of p and q over the larger, e^-|gap|
  // p and q hardly meet (fp64 only): what every gradient has in proportion to q cancels later, and
  // is left out.
  bool apart = false;
};
template <class V> struct Point {
  V value, grad;
};
struct KlWeights {
  double forward, reverse;
};

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd

#include "tape.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// The n-th divergence of this file; the counter lets each register itself without a constructor at
// load time (which would run AVX-512 code on machines that lack it).
template <int n> struct Registered;
constexpr int kFirstDivergence = __COUNTER__ + 1;
#define FUSEDKD_DIVERGENCE(called) FUSEDKD_DIVERGENCE_(called, __COUNTER__)
#define FUSEDKD_DIVERGENCE_(called, n)                  \
  template <> struct Registered<n - kFirstDivergence> { \
    typedef called type;                                \
    static constexpr const char* name = #called;        \
  }

#if defined(FUSEDKD_POINTWISE)  // a library of one divergence of somebody's own: emit.py
#include FUSEDKD_POINTWISE
FUSEDKD_DIVERGENCE(custom);
#else

// -------------------------------------------------------------------------------------------------

struct forward_kl {
  static KlWeights kl(const double*) { return {1, 0}; }
};
FUSEDKD_DIVERGENCE(forward_kl);

struct reverse_kl {
  static KlWeights kl(const double*) { return {0, 1}; }
};
FUSEDKD_DIVERGENCE(reverse_kl);

struct mixed_kl {
  static KlWeights kl(const double* w) { return {w[0], 1 - w[0]}; }
};
FUSEDKD_DIVERGENCE(mixed_kl);

// m = w p + (1 - w) q seen from p and q. With the larger of the two taken out, log m loses nothing
// where p ~ q, and no term is ever 0 times infinity.
template <class V> struct Mixture {
  V p_over_m, q_over_m;  // as ratios
  V p_to_m, q_to_m;      // as differences of logarithms
  FUSEDKD_INLINE Mixture(const Entry<V>& e, double weight) {
    const V w = splat<V>(weight), rest = splat<V>(1 - weight), zero = {};
    auto more = e.gap > zero;
    V less = minus_abs(e.gap), u = e.ratio;
    V share = more ? fma(rest, u, w) : fma(w, u, rest);
    // u - u: a NaN on either side, which log_normal would swallow
    V log_share = log_normal(share) + (u - u), over = splat<V>(1) / share;
    p_over_m = more ? over : u * over;
    q_over_m = more ? u * over : over;
    p_to_m = (more ? zero : less) - log_share;
    q_to_m = (more ? less : zero) - log_share;
  }
};
// log q - log m + log(1 - w) = -log(1 + w / (1 - w) p / q), to all digits where q is the larger by
// far.
template <class V> FUSEDKD_INLINE V from_q(const Entry<V>& e, const Mixture<V>& m, double weight) {
  const V one = splat<V>(1), x = splat<V>(weight / (1 - weight)) * e.ratio, y = one + x;
  const V log1p = log_normal(y) + (x - (y - one)) / y;
  return e.gap > V{} ? m.q_to_m + splat<V>(::log1p(-weight)) : -log1p;
}

struct jsd {
  static constexpr bool kHeedsApart = true;
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    Mixture<V> m(e, w[0]);
    V grad = splat<V>(1 - w[0]) * mul0(e.q, m.q_to_m),
      value = fma(splat<V>(w[0]), mul0(e.p, m.p_to_m), grad);
    if (e.apart) grad = splat<V>(1 - w[0]) * mul0(e.q, from_q(e, m, w[0]));
    return {value, grad};
  }
};
FUSEDKD_DIVERGENCE(jsd);

struct skew_forward_kl {
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    Mixture<V> m(e, w[0]);
    return {mul0(e.p, m.p_to_m), splat<V>(w[0] - 1) * e.p * m.q_over_m};
  }
};
FUSEDKD_DIVERGENCE(skew_forward_kl);

struct skew_reverse_kl {
  static constexpr bool kHeedsApart = true;
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    Mixture<V> m(e, 1 - w[0]);
    V value = mul0(e.q, m.q_to_m), grad = value;
    if (e.apart) grad = mul0(e.q, from_q(e, m, 1 - w[0]));
    // 1 - w q / m = (1 - w) p / m
    return {value, fma(e.p, splat<V>(1 - w[0]) * m.q_over_m, grad)};
  }
};
FUSEDKD_DIVERGENCE(skew_reverse_kl);

struct total_variation {
  static constexpr bool kHeedsApart = true;
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double*) {
    V half = splat<V>(0.5), zero = {}, d = e.p - e.q;
    V sign = d > zero ? half : d < zero ? -half : zero;
    if (e.apart) sign += half;
    return {half * abs(d), -e.q * sign};
  }
};
FUSEDKD_DIVERGENCE(total_variation);

// -(C - a/c P - b/c Q) / (a b) with C = p^a q^b, P = p^c, Q = q^c and c = a + b, from the
// differences P - C and Q - C. Those are known to all digits, for P / C = e^(b gap) and Q / C =
// e^(-a gap); subtracted, the terms would lose most of theirs.
template <class V>
FUSEDKD_INLINE Point<V> cross_powers(const Entry<V>& e, double a, double b, V power_p, V power_q) {
  const V zero = {}, infinity = splat<V>(kInfinity), log2e = splat<V>(kLog2E), va = splat<V>(a),
          vb = splat<V>(b);
  const V of_p = splat<V>(1 / (b * (a + b))), of_q = splat<V>(1 / (a * (a + b))),
          of_grad = splat<V>(1 / a);
  auto more = e.gap > zero;
  if (a > 0 &&
      b > 0) {  // C lies between P and Q: from the larger one down to C, then on to the smaller
    V less = minus_abs(e.gap), larger = more ? power_p : power_q;
    V down = larger * exp2m1(less * (more ? vb : va), log2e),
      on = exp2m1(less * (more ? va : vb), log2e);
    V smaller = fma(down, on, larger * on);
    V p_over = more ? -down : smaller, q_over = more ? smaller : -down;
    return {fma(of_p, p_over, of_q * q_over), of_grad * q_over};
  }
  V from_p = exp2m1(minus_abs(vb * e.gap), log2e), from_q = exp2m1(minus_abs(va * e.gap), log2e);
  auto neither = (e.lp == -infinity) & (e.lq == -infinity);
  V cross = exp(fma(va, e.lp, vb * e.lq));
  cross = neither ? zero : cross;
  V p_over = (vb * e.gap > zero ? -power_p : cross) * from_p,
    q_over = (va * e.gap < zero ? -power_q : cross) * from_q;
  // of the powers in the gradient, one that is infinite counts as 0
  auto over_c = cross == infinity, over_q = power_q == infinity,
       infinite = over_c | over_q | (power_p == infinity);
  V rest = of_grad * ((over_q ? zero : power_q) - (over_c ? zero : cross));
  V value = fma(of_p, p_over, of_q * q_over), grad = of_grad * q_over;
  return {infinite ? infinity : value, over_c | over_q ? rest : grad};
}

struct alpha {
  static constexpr bool kHeedsApart = true;
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    Point<V> point = cross_powers(e, w[0], 1 - w[0], e.p, e.q);
    if (e.apart) point.grad = splat<V>(-1 / w[0]) * mul0(e.q, exp(splat<V>(w[0]) * e.gap));
    return point;
  }
};
FUSEDKD_DIVERGENCE(alpha);

struct alpha_beta {
  template <class V> FUSEDKD_INLINE static Point<V> at(const Entry<V>& e, const double* w) {
    const double a = w[0], b = w[1];
    const V infinity = splat<V>(kInfinity), zero = {}, c = splat<V>(a + b);
    auto neither = (e.lp == -infinity) & (e.lq == -infinity);
    V power_p = neither ? zero : exp(c * e.lp), power_q = neither ? zero : exp(c * e.lq);
    return cross_powers(e, a, b, power_p, power_q);
  }
};
FUSEDKD_DIVERGENCE(alpha_beta);

FUSEDKD_DIVERGENCE(tape);
#endif

// -------------------------------------------------------------------------------------------------

constexpr int kDivergences = __COUNTER__ - kFirstDivergence;

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
