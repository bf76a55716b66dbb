// What is known only at run time, as tables: sweeps by kind of divergence, and the divergences of
// pointwise.h.
#pragma once

#include "sweeps.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

template <class X>
using StatisticsRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&,
                               Sums<typename Format<X>::F>&);
template <class X>
using MiddleRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&,
                           Middle<typename Format<X>::F>&);
template <class X>
using GradientRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&,
                             const Coefficients&);

#define FUSEDKD_FLAVOURS(run_of, X, kind)                                      \
  {                                                                            \
    {run_of<X, kind, false, false>::run, run_of<X, kind, false, true>::run}, { \
      run_of<X, kind, true, false>::run, run_of<X, kind, true, true>::run      \
    }                                                                          \
  }
#if defined(FUSEDKD_POINTWISE)  // which has no need of the KLs' sweeps
#define FUSEDKD_KINDS(run_of, X) \
  {FUSEDKD_FLAVOURS(run_of, X, kNone), {}, {}, {}, FUSEDKD_FLAVOURS(run_of, X, kEntrywise)}
#else
#define FUSEDKD_KINDS(run_of, X)                                              \
  {FUSEDKD_FLAVOURS(run_of, X, kNone), FUSEDKD_FLAVOURS(run_of, X, kForward), \
   FUSEDKD_FLAVOURS(run_of, X, kReverse), FUSEDKD_FLAVOURS(run_of, X, kBoth), \
   FUSEDKD_FLAVOURS(run_of, X, kEntrywise)}
#endif
template <class X> struct Runs {  // [kind][cross-entropy at another temperature][far]
  static constexpr StatisticsRun<X> statistics[5][2][2] = FUSEDKD_KINDS(StatisticsSweep, X);
  static constexpr GradientRun<X> gradient[5][2][2] = FUSEDKD_KINDS(GradientSweep, X);
};

// What pointwise.h holds, as a table. A divergence with `kl` has no sweep of its own.
struct Listed {
  const char* name;
  KlWeights (*kl)(const double*);
  MiddleRun<uint16_t> bf16[2];
  MiddleRun<float> f32[2];
  MiddleRun<double> f64[2];
  const MiddleRun<uint16_t>* middle(uint16_t) const { return bf16; }
  const MiddleRun<float>* middle(float) const { return f32; }
  const MiddleRun<double>* middle(double) const { return f64; }
};
template <class D>
constexpr auto listed(const char* name, int) -> decltype(D::kl(nullptr), Listed{}) {
  return {name, &D::kl, {}, {}, {}};
}
template <class D> constexpr Listed listed(const char* name, long) {
  return {name,
          nullptr,
          {Entrywise<D, uint16_t, false>::run, Entrywise<D, uint16_t, true>::run},
          {Entrywise<D, float, false>::run, Entrywise<D, float, true>::run},
          {Entrywise<D, double, false>::run, Entrywise<D, double, true>::run}};
}
template <class> struct List;
template <int... n> struct List<std::integer_sequence<int, n...>> {
  static constexpr Listed all[] = {listed<typename Registered<n>::type>(Registered<n>::name, 0)...};
};
constexpr const Listed* kListed = List<std::make_integer_sequence<int, kDivergences>>::all;

// Values and gradients of a few categories, in fp64: (parameters, weights, lp, lq, gradients, n) ->
// sum of values. n is a multiple of kEntryStep; lp = lq = -inf is nothing.
using EntriesRun = double (*)(const double*, KlWeights, const double*, const double*, double*,
                              int64_t);

FUSEDKD_INLINE Entry<VD> entry(VD lp, VD lq) {
  const VD nothing = splat<VD>(-kInfinity);
  const VD gap = ((lp == nothing) & (lq == nothing)) ? VD{} : lp - lq;
  return {lp, lq, gap, exp(lp), exp(lq), exp(minus_abs(gap))};
}
struct MixOfKls {
  FUSEDKD_INLINE static Point<VD> at(const Entry<VD>& e, const double*, KlWeights w) {
    const VD forward = splat<VD>(w.forward), reverse = splat<VD>(w.reverse), zero = {};
    VD to_p = mul0(e.p, e.gap), to_q = mul0(e.q, -e.gap);
    // an infinite gap counts as 0 in the gradient
    VD bounded = abs(e.gap) == splat<VD>(kInfinity) ? zero : to_q;
    return {mul0(forward, to_p) + mul0(reverse, to_q), reverse * (bounded + e.q) - forward * e.p};
  }
};
template <class D> struct Pointwise {
  FUSEDKD_INLINE static Point<VD> at(const Entry<VD>& e, const double* w, KlWeights) {
    return D::at(e, w);
  }
};
template <class Divergence>
double entries(const double* parameters, KlWeights weights, const double* lp, const double* lq,
               double* grad, int64_t n) {
  VD sum = {};
  for (int64_t i = 0; i < n; i += sizeof(VD) / sizeof(double)) {
    Point<VD> point =
        Divergence::at(entry(load<VD>(lp + i), load<VD>(lq + i)), parameters, weights);
    sum += point.value;
    store(grad + i, point.grad);
  }
  return total(sum);
}
template <class D> constexpr auto entries_of(int) -> decltype(D::kl(nullptr), EntriesRun{}) {
  return entries<MixOfKls>;
}
template <class D> constexpr EntriesRun entries_of(long) { return entries<Pointwise<D>>; }
template <class> struct EntriesList;
template <int... n> struct EntriesList<std::integer_sequence<int, n...>> {
  static constexpr EntriesRun all[] = {entries_of<typename Registered<n>::type>(0)...};
};
constexpr const EntriesRun* kEntries =
    EntriesList<std::make_integer_sequence<int, kDivergences>>::all;

// The largest value of a divergence that says what to do where p and q have nothing in common,
// which is where it has it.
template <class D> constexpr auto heeds_apart(int) -> decltype(D::kHeedsApart) {
  return D::kHeedsApart;
}
template <class D> constexpr bool heeds_apart(long) { return false; }
template <class> struct HeedsApart;
template <int... n> struct HeedsApart<std::integer_sequence<int, n...>> {
  static constexpr bool all[] = {heeds_apart<typename Registered<n>::type>(0)...};
};
inline double disjoint(int divergence, const double* parameters) {
  if (!HeedsApart<std::make_integer_sequence<int, kDivergences>>::all[divergence]) return kInfinity;
  double lp[kEntryStep], lq[kEntryStep], grad[kEntryStep];
  for (int64_t i = 0; i < kEntryStep; ++i) lp[i] = lq[i] = -kInfinity;
  lp[0] = lq[1] = 0;
  return kEntries[divergence](parameters, KlWeights{0, 0}, lp, lq, grad, kEntryStep);
}

inline int find(const char* name) {
  for (int i = 0; i < kDivergences; ++i)
    if (strcmp(kListed[i].name, name) == 0) return i;
  return -1;
}
inline bool keeps(int divergence) { return kListed[divergence].kl == nullptr; }

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
