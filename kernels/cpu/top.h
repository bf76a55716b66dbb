// The largest logits of a row and, in the same sweep, the mass of all others, which is summed up as
// it is and not as a small difference.
#pragma once

#include "softmax.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

FUSEDKD_INLINE bool any_above(VF a, VF b) {
#if defined(FUSEDKD_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(FUSEDKD_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  for (size_t i = 0; i < sizeof a / sizeof a[0]; ++i)
    if (a[i] > b[i]) return true;
  return false;
#endif
}
FUSEDKD_INLINE bool any_above(VD a, VD b) {
  for (size_t i = 0; i < sizeof a / sizeof a[0]; ++i)
    if (a[i] > b[i]) return true;
  return false;
}

FUSEDKD_INLINE float number(uint16_t x) { return from_bf16(x); }
FUSEDKD_INLINE float number(float x) { return x; }
FUSEDKD_INLINE double number(double x) { return x; }
FUSEDKD_INLINE void set(uint16_t* x, float y) { *x = to_bf16(y); }
template <class F> FUSEDKD_INLINE void set(F* x, F y) { *x = y; }

// The k largest so far, the least of them first: of equal ones that with the larger id.
struct Heap {
  double* values;
  int64_t* ids;
  int64_t size, most;

  bool below(int64_t a, int64_t b) const {
    return values[a] != values[b] ? values[a] < values[b] : ids[a] > ids[b];
  }
  void swap(int64_t a, int64_t b) {
    const double value = values[a];
    const int64_t id = ids[a];
    values[a] = values[b], ids[a] = ids[b], values[b] = value, ids[b] = id;
  }
  void sink(int64_t i, int64_t n) {
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
      if (child + 1 < n && below(child + 1, child)) ++child;
      if (!below(child, i)) return;
      swap(i, child);
    }
  }
  bool full() const { return size == most; }
  void add(double value, int64_t id) {  // while it is not full
    int64_t i = size++;
    values[i] = value, ids[i] = id;
    for (; i > 0 && below(i, (i - 1) / 2); i = (i - 1) / 2) swap(i, (i - 1) / 2);
  }
  void replace(double value, int64_t id) { values[0] = value, ids[0] = id, sink(0, size); }
  void sort() {  // the largest first
    for (int64_t n = size; n > 1; sink(0, --n)) swap(0, n - 1);
  }
};

template <class X> class TopRow {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;

 public:
  TopRow(const TopCall& call, int64_t n)
      : call_(call), n_(n), side_(call.logits, call.tokens, n, -1),
        also_(call.ids + n * call.entries),
        heap_{call.top_values + n * call.k, call.top_ids + n * call.k, 0, call.k} {
    reference_.scale = (F)(kLog2E / call.temperature);
  }

  void run() {
    double* put = call_.statistics + n_ * (kSoftmaxFields + call_.entries);
    memset(put, 0, (kSoftmaxFields + call_.entries) * sizeof *put);
    if (call_.counts == nullptr || call_.counts[n_]) {
      for (int64_t from = 0, n; from < call_.columns; from += n) tile(from, n = length(from));
      finish(put);
    }
    heap_.sort();
    for (int64_t i = heap_.size; i < call_.k; ++i) heap_.values[i] = -kInfinity, heap_.ids[i] = -1;
    const double rate = reference_.inverse_temperature();
    for (int64_t i = 0; i < heap_.size; ++i) heap_.values[i] *= rate, heap_.ids[i] += call_.offset;
  }

 private:
  typedef void (*Sweep)(const X*, int64_t, const Reference<F>&, double*, double*);
  static constexpr Sweep kSweeps[2] = {softmax_sweep<X, false, false>,
                                       softmax_sweep<X, false, true>};
  static constexpr double kReach = 20;
  static constexpr int64_t kBlock = 2 * Fmt::step;

  int64_t length(int64_t from) const {
    const int64_t rest = call_.columns - from;
    if (rest < Fmt::step) return rest;
    return rest < kTile<X> ? rest / Fmt::step * Fmt::step : kTile<X>;
  }
  static int64_t padded(int64_t n) { return (n + Fmt::step - 1) / Fmt::step * Fmt::step; }
  F threshold() const { return heap_.full() ? (F)heap_.values[0] : -(F)kInfinity; }
  double power(double x) const { return ::exp2(x * reference_.scale - reference_.whole); }
  bool is_also(int64_t column) const {
    for (int64_t i = 0; i < call_.entries; ++i)
      if (also_[i] - call_.offset == column) return true;
    return false;
  }

  void tile(int64_t from, int64_t n) {
    const X* x = side_.get(from, n, -(F)kInfinity, nullptr);
    F lo, hi;
    extremes(x, padded(n), &lo, &hi);
    outside_ *= reference_.advance(hi);
    taken_ = 0;
    if (hi > threshold()) take(x, from, n, lo);
    for (int64_t i = 0; i < call_.entries; ++i)
      if (const int64_t column = also_[i] < 0 ? -1 : also_[i] - call_.offset;
          from <= column && column < from + n)
        mask(x, column - from, n, lo);
    // Entries that are taken out stand at the tile's lowest, which is taken off again: of few, for
    // it is a difference.
    bool far = !reference_.near(lo, kReach);
    double sum = 0, unused = 0;
    if (taken_ != 0 && (far || 4 * taken_ > n)) {
      for (int64_t i = 0; i < n; ++i)
        if (out_[i]) set(work_ + i, -(F)kInfinity);
      far = true;
    }
    kSweeps[far](taken_ ? work_ : x, padded(n), reference_, &sum, &unused);
    if (taken_ != 0 && !far) {
      const double least = taken_ * power((double)lo);
      sum = sum > least ? sum - least : 0;
    }
    outside_ += sum;
  }
  void take(const X* x, int64_t from, int64_t n, F lo) {
    V bar = splat<V>(threshold());
    for (int64_t i = 0; i < n; i += kBlock) {
      bool hit = false;
      for (int64_t j = i; j < i + kBlock && j < padded(n); j += Fmt::step) {
        const Pair<V> v = Fmt::get(x + j);
        hit = hit || any_above(max(v.a, v.b), bar);
      }
      if (!hit) continue;
      for (int64_t j = i; j < n && j < i + kBlock; ++j) {
        const F value = number(x[j]);
        if (!(value > threshold())) continue;
        mask(x, j, n, lo);
        put(value, from + j);
      }
      bar = splat<V>(threshold());
    }
  }
  void put(F value, int64_t column) {
    if (!heap_.full()) return heap_.add(value, column);
    if (!is_also(heap_.ids[0])) outside_ += power(heap_.values[0]);
    heap_.replace(value, column);
  }
  void mask(const X* x, int64_t i, int64_t n, F lo) {
    if (taken_ == 0) memcpy(work_, x, padded(n) * sizeof *x), memset(out_, 0, sizeof out_);
    taken_ += !out_[i];
    out_[i] = true;
    set(work_ + i, lo);
  }

  void finish(double* put) {
    const double rate = reference_.inverse_temperature();
    double total = outside_;
    for (int64_t i = 0; i < heap_.size; ++i) total += power(heap_.values[i]);
    for (int64_t i = 0; i < call_.entries; ++i) {
      const int64_t column = also_[i] < 0 ? -1 : also_[i] - call_.offset;
      double unused;
      if (column < 0 || column >= call_.columns) continue;
      const double z = logit(call_.logits, side_.row, column, &unused);
      put[kSoftmaxFields + i] = rate * z;
      bool known = false;
      for (int64_t k = 0; k < heap_.size; ++k) known = known || heap_.ids[k] == column;
      if (!known) total += power(z);
    }
    const double shift = ::exp2((double)reference_.max * reference_.scale - reference_.whole);
    put[0] = reference_.seen ? rate * reference_.max : -kInfinity;
    put[1] = reference_.seen ? total / shift : total;
    put[2] = reference_.seen ? outside_ / shift : outside_;
  }

  const TopCall& call_;
  const int64_t n_;
  Side<X> side_;
  const int64_t* also_;
  Heap heap_;
  Reference<F> reference_;
  double outside_ = 0;
  int64_t taken_ = 0;
  bool out_[kTile<X> + Fmt::step];
  alignas(64) X work_[kTile<X> + Fmt::step];
};

inline void top_row(const TopCall& call, int64_t n) {
  if (call.logits.dtype == DType::f64) return TopRow<double>(call, n).run();
  if (call.logits.dtype == DType::bf16 && !transforms(call.logits))
    return TopRow<uint16_t>(call, n).run();
  TopRow<float>(call, n).run();
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
