// Log-probabilities of single tokens and the entropy of their row, without a teacher: one sweep for
// the statistics, one for the gradient.
#pragma once

#include "dense.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// The sum of a tile's exponentials and, for the entropy, of them times the gap to the largest logit
// so far.
template <class X, bool kGap, bool kFar>
void softmax_sweep(const X* x, int64_t n, const Reference<typename Format<X>::F>& r, double* sum,
                   double* gap) {
  typedef Format<X> Fmt;
  typedef typename Fmt::V V;
  const Power<V, kFar> power(r);
  const V max = splat<V>(r.max);
  Sum<V> sums, gaps;
  const auto add = [&](V v) __attribute__((always_inline)) {
    sums.add_power(power, v);  // the same bits whether gaps are wanted or not
    if (!kGap) return;
    const V e = power(v);
    if (kFar) gaps += mul0(e, v - max);
    else gaps.add_product(e, v - max);
  };
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + kFold * Fmt::step < n ? i + kFold * Fmt::step : n;
    for (; i < end; i += Fmt::step) {
      const Pair<V> v = Fmt::get(x + i);
      add(v.a), add(v.b);
    }
    sums.fold(), gaps.fold();
  }
  *sum += sums.value(), *gap += gaps.value();
}

// q (constant + linear (x - max)), `linear` in units of the logits.
template <class X, bool kLinear, bool kFar>
void slope_sweep(const X* x, int64_t n, const Reference<typename Format<X>::F>& r, double share,
                 double constant, double linear, X* out, bool stream) {
  typedef Format<X> Fmt;
  typedef typename Fmt::V V;
  const Power<V, kFar> power(r, kLinear ? share : share * constant);
  const V max = splat<V>(r.max), rate = splat<V>(linear), base = splat<V>(constant),
          most = splat<V>(Of<V>::largest);
  const auto at = [&](V v) __attribute__((always_inline)) {
    if constexpr (!kLinear) return power(v);
    V factor = fma(v - max, rate, base);
    if (kFar) factor = fusedkd::FUSEDKD_ISA::max(-most, min(most, factor));
    return kFar ? mul0(power(v), factor) : power(v) * factor;
  };
  for (int64_t i = 0; i < n; i += Fmt::step) {
    const Pair<V> v = Fmt::get(x + i);
    Fmt::put(out + i, {at(v.a), at(v.b)}, stream);
  }
}

template <class X> class SoftmaxRow {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;

 public:
  SoftmaxRow(const SoftmaxCall& call, int64_t n)
      : call_(call), n_(n), side_(call.logits, call.tokens, n, -1) {
    reference_.scale = (F)(kLog2E / call.temperature);
  }

  void statistics() {
    double* put = call_.statistics + n_ * (kSoftmaxFields + call_.entries);
    memset(put, 0, (kSoftmaxFields + call_.entries) * sizeof *put);
    if (!counts()) return;
    double sum = 0, gap = 0;
    for (int64_t from = 0, n; from < call_.columns; from += n) {
      n = length(from);
      const X* x = side_.get(from, n, -(F)kInfinity, nullptr);
      F lo, hi;
      extremes(x, padded(n), &lo, &hi);
      const F before = reference_.max;
      const bool seen = reference_.seen;
      const double by = reference_.advance(hi);
      if (seen && reference_.max != before) gap += ((double)before - reference_.max) * sum;
      sum *= by, gap *= by;
      kSweeps[call_.entropy][!reference_.near(lo, kReach)](x, padded(n), reference_, &sum, &gap);
    }
    const double rate = reference_.inverse_temperature();
    put[0] = reference_.seen ? rate * reference_.max : -kInfinity;
    // 1 is the largest logit's own: less is rounding
    put[1] = reference_.seen && !(sum / shift() < 1) ? sum / shift() : reference_.seen ? 1 : sum;
    put[2] = sum == 0 ? 0 : rate * gap / sum;
    const int64_t* ids = call_.ids + n_ * call_.entries;
    for (int64_t k = 0; k < call_.entries; ++k) {
      const int64_t column = ids[k] < 0 ? -1 : ids[k] - call_.offset;
      double unused;
      if (column >= 0 && column < call_.columns)
        put[kSoftmaxFields + k] = rate * logit(call_.logits, side_.row, column, &unused);
    }
  }

  void gradient() {
    grad_ = (char*)row_start(call_.grad, call_.tokens, n_);
    if (!counts()) return zero(call_.grad.dtype, grad_, call_.grad_columns);
    const double *of = call_.statistics + n_ * (kSoftmaxFields + call_.entries),
                 rate = reference_.inverse_temperature();
    const double linear = call_.linear ? call_.linear[n_] : 0,
                 constant = call_.constant[n_] - (linear == 0 ? 0 : linear * of[2]);
    if (of[1] == 0) {  // every logit is -inf
      zero(call_.grad.dtype, grad_, call_.columns);
    } else if (const double all = constant + linear + of[0] + of[1]; all - all != 0) {
      fill(call_.grad.dtype, __builtin_nan(""), grad_, call_.columns);
    } else if (constant == 0 && linear == 0) {
      zero(call_.grad.dtype, grad_, call_.columns);
    } else {
      reference_.advance((F)(of[0] / rate));
      const double share = 1 / (shift() * of[1]);
      const double reach = linear == 0 ? ::fabs(::log2(::fabs(share * constant))) : kReach;
      for (int64_t from = 0, n; from < call_.columns; from += n)
        tile(from, n = length(from), share, constant, linear * rate, reach);
    }
    const int64_t size = size_of(call_.grad.dtype);
    memset(grad_ + call_.columns * size, 0, (call_.grad_columns - call_.columns) * size);
  }

 private:
  typedef void (*Sweep)(const X*, int64_t, const Reference<F>&, double*, double*);
  typedef void (*Slope)(const X*, int64_t, const Reference<F>&, double, double, double, X*, bool);
  static constexpr Sweep kSweeps[2][2] = {
      {softmax_sweep<X, false, false>, softmax_sweep<X, false, true>},
      {softmax_sweep<X, true, false>, softmax_sweep<X, true, true>}};
  static constexpr Slope kSlopes[2][2] = {
      {slope_sweep<X, false, false>, slope_sweep<X, false, true>},
      {slope_sweep<X, true, false>, slope_sweep<X, true, true>}};
  static constexpr double kReach = 20;  // powers of two, see Reference::near

  bool counts() const { return call_.counts == nullptr || call_.counts[n_]; }
  // Of the tile that begins there; what is left after whole vectors is one of its own.
  int64_t length(int64_t from) const {
    const int64_t rest = call_.columns - from;
    if (rest < Fmt::step) return rest;
    return rest < kTile<X> ? rest / Fmt::step * Fmt::step : kTile<X>;
  }
  static int64_t padded(int64_t n) { return (n + Fmt::step - 1) / Fmt::step * Fmt::step; }
  double shift() const {
    return ::exp2((double)reference_.max * reference_.scale - reference_.whole);
  }

  void tile(int64_t from, int64_t n, double share, double constant, double linear, double reach) {
    const bool sloped = transforms(call_.logits);
    char* to = grad_ + from * size_of(call_.grad.dtype);
    const X* x = side_.get(from, n, -(F)kInfinity, sloped ? (F*)slope_ : nullptr);
    F lo, hi;
    extremes(x, padded(n), &lo, &hi);
    const bool direct = !sloped && size_of(call_.grad.dtype) == sizeof(X) && n % Fmt::step == 0;
    const bool stream = direct && call_.stream && (intptr_t)to % 64 == 0;
    kSlopes[linear != 0][!reference_.near(lo, reach)](x, padded(n), reference_, share, constant,
                                                      linear, direct ? (X*)to : out_, stream);
    if (!direct) finish(out_, to, n);
  }
  void finish(uint16_t* from, char* to, int64_t n) { memcpy(to, from, n * sizeof *from); }
  void finish(F* from, char* to, int64_t n) {
    if (transforms(call_.logits))  // at -inf the slope may be no number
      for (int64_t i = 0; i < n; ++i) from[i] = from[i] == 0 ? 0 : from[i] * ((F*)slope_)[i];
    write(call_.grad.dtype, from, to, n);
  }

  const SoftmaxCall& call_;
  const int64_t n_;
  Side<X> side_;
  char* grad_ = nullptr;
  Reference<F> reference_;
  alignas(64) F slope_[kTile<X> + Fmt::step];
  alignas(64) X out_[kTile<X> + Fmt::step];
};

template <class X> void softmax_row_of(const SoftmaxCall& call, int64_t n) {
  SoftmaxRow<X> row(call, n);
  if (call.grad.data) row.gradient();
  else row.statistics();
}
inline void softmax_row(const SoftmaxCall& call, int64_t n) {
  const bool bf16 = call.logits.dtype == DType::bf16 && !transforms(call.logits) &&
                    (call.grad.data == nullptr || call.grad.dtype == DType::bf16);
  if (call.logits.dtype == DType::f64) return softmax_row_of<double>(call, n);
  if (bf16) return softmax_row_of<uint16_t>(call, n);
  softmax_row_of<float>(call, n);
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
