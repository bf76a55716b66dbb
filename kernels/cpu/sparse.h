// One row against a teacher of K entries. The sweeps are those of dense rows without a teacher;
// they run over the row with the ids taken out, so that what the student has outside them is summed
// as it is and not as a small difference. The K entries are gathered and computed in fp64, and
// written over what the last sweep left in their places.
#pragma once

#include "dense.h"
#include "scale.h"
#if !defined(FUSEDKD_POINTWISE)
#include "top.h"
#endif

namespace fusedkd {
namespace FUSEDKD_ISA {

// log of (e^x + sum e^(rate z)).
inline double log_sum_exp(double x, double rate, const double* z, int64_t n) {
  double most = x;
  for (int64_t i = 0; i < n; ++i) most = z[i] * rate > most || z[i] != z[i] ? z[i] * rate : most;
  if (!(::fabs(most) < kInfinity)) return most;  // nothing at all, or no number
  VD sum = {};
  for (int64_t i = 0; i < n; i += sizeof(VD) / sizeof(double))
    sum += exp(fma(load<VD>(z + i), splat<VD>(rate), splat<VD>(-most)));
  return most + ::log(total(sum) + ::exp(x - most));
}

template <class X> class SparseRow : public OneRow<X> {
  typedef OneRow<X> Dense;
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Dense::Hard Hard;
  using Dense::begin, Dense::call_, Dense::end, Dense::expected_student_, Dense::far, Dense::grad_,
      Dense::grad_sum_, Dense::kept, Dense::kind_, Dense::label_, Dense::log_student_,
      Dense::log_unit_, Dense::minima, Dense::n_, Dense::padded, Dense::row_, Dense::student_,
      Dense::student_label_, Dense::sums_, Dense::teacher_, Dense::tiles_, Dense::top_student_,
      Dense::unit_;

 public:
  SparseRow(const RowsCall& call, const Workspace& work, int64_t n)
      : Dense(call, work, n, call.exact) {
    padded_ = (call.entries + 1 + kEntryStep - 1) / kEntryStep * kEntryStep;
    z_ = work.entries, slopes_ = z_ + padded_, lp_ = slopes_ + padded_, lq_ = lp_ + padded_,
    entry_grad_ = lq_ + padded_;
  }

  void plan() {
    Dense::plan();
    outside_ = kind_ == kEntrywise && call_.tail == Tail::absent;
    gather();
  }
  bool cancels(double) const { return false; }
  void again() const {}

  // The ids that lie here. All are asked for before the first is needed: each lies in another line
  // of memory.
  void gather() {
    const int32_t *all = call_.indices + n_ * call_.entries, *last = all + call_.entries;
    const double* log_probs = call_.log_probs + n_ * (call_.entries + 1);
    for (indices_ = all; indices_ < last && *indices_ < call_.offset;) ++indices_;
    const int64_t first = indices_ - all;
    for (; indices_ + count_ < last && column(count_) < call_.columns; ++count_)
      __builtin_prefetch((const char*)student_.row + column(count_) * size_of(call_.student.dtype));
    for (int64_t i = 0; i < padded_; ++i) z_[i] = lp_[i] = lq_[i] = -kInfinity;
    for (int64_t i = 0; i < count_; ++i) {
      z_[i] = logit(call_.student, student_.row, column(i), slopes_ + i);
      lp_[i] = log_probs[first + i];
    }
    lp_[count_] = log_probs[call_.entries];
  }
  int64_t column(int64_t i) const { return indices_[i] - call_.offset; }

  static void put(F value, X* to) {
    write(sizeof(X) == 2 ? DType::bf16 : sizeof(X) == 4 ? DType::f32 : DType::f64, &value, to, 1);
  }
  X* cover(X* tile, int64_t k, const int32_t* from, const int32_t* to, F value) {
    for (const int32_t* id = from; id < to; ++id)
      put(value, tile + (*id - call_.offset - begin(k)));
    return tile;
  }
  X* in_buffer(const X* tile, int64_t n) {
    if (tile != student_.buffer) memcpy(student_.buffer, tile, n * sizeof(X));
    return student_.buffer;
  }
  const int32_t* ids_until(const int32_t* id, int64_t column) const {
    while (id < indices_ + count_ && *id < column + call_.offset) ++id;
    return id;
  }
  const X* without_ids(int64_t k, const int32_t** id) {
    const int32_t* from = *id;
    const int64_t n = end(k) - begin(k);
    const X* x = student_.get(begin(k), n, -(F)kInfinity, nullptr);
    *id = ids_until(from, end(k));
    return *id == from ? x : cover(in_buffer(x, padded(n)), k, from, *id, -(F)kInfinity);
  }

  // The first sweep of dense rows. An id is covered with the tile's smallest entry, of which as
  // many exponentials are taken off again: -inf would cost nearly every tile the fast sweep. Where
  // that could cancel, -inf it is.
  void statistics() {
    const int32_t* id = indices_;
    for (int64_t k = 0; k < tiles_; ++k) {
      const int64_t n = end(k) - begin(k);
      Tile<X> t = this->tile(k, false);
      F hi, fill = 0;
      extremes(t.student, t.n, minima(k), &hi);
      if (call_.measures) this->best(t.student, begin(k), end(k), hi, all_, &top_student_);
      all_.advance(hi);
      const int32_t* from = id;
      id = ids_until(from, end(k));
      if (id != from) {
        fill = id - from > n / 2 ? -(F)kInfinity : *minima(k);
        t.student = cover(in_buffer(t.student, t.n), k, from, id, fill);
        bool same =
            student_.as_is && fill == *minima(k);  // the extremes, if no id held the largest entry
        for (const int32_t* each = from; each < id; ++each) same &= z_[each - indices_] < hi;
        if (!same) extremes(t.student, t.n, minima(k), &hi);
      }
      sums_.student *= row_.student.advance(hi), sums_.unit *= row_.unit.advance(hi);
      Runs<X>::statistics[kNone][unit_][far(k, false)](t, row_, sums_);
      if (id == from || fill == -(F)kInfinity) continue;
      sums_.student -= (id - from) * power(row_.student, fill);
      if (unit_) sums_.unit -= (id - from) * power(row_.unit, fill);
    }
    top_student_ += call_.offset;
    log_tail_ = log_sum(row_.student, sums_.student);
    log_student_ = log_sum_exp(log_tail_, row_.student.inverse_temperature(), z_, padded_);
    log_unit_ = log_student_;
    if (unit_)
      log_unit_ =
          log_sum_exp(log_sum(row_.unit, sums_.unit), row_.unit.inverse_temperature(), z_, padded_);
    if (call_.measures || conditional())
      log_inside_ = log_sum_exp(-kInfinity, row_.student.inverse_temperature(), z_, padded_);
  }
  void put_statistics() const {
    fusedkd::Statistics& put = call_.statistics[n_];
    put = {};
    put.student_max = this->most(all_);
    put_log_sum(log_student_, &put.student_exponent, &put.student_sum);
    if (unit_) put_log_sum(log_unit_, &put.unit_exponent, &put.unit_sum);
    put.outside_max = this->most(row_.student), put.outside_exponent = this->exponent(row_.student);
    put.outside_sum = sums_.student;
    put_log_sum(log_inside_, &put.inside_exponent, &put.inside_sum);
    this->put_measured(put);
  }
  static void put_log_sum(double x, double* exponent, double* sum) {
    *exponent = x == -kInfinity ? x : ::nearbyint(x / kLn2),
    *sum = x == -kInfinity ? 0 : ::exp(x - *exponent * kLn2);
  }
  void restore() {
    const fusedkd::Statistics& merged = call_.statistics[n_];
    all_.advance((F)merged.student_max);
    row_.student.advance((F)merged.outside_max), row_.unit.advance((F)merged.outside_max);
    sums_.student = merged.outside_sum;
    log_tail_ = log_sum(row_.student, sums_.student);
    log_student_ = merged.student_exponent * kLn2 + ::log(merged.student_sum);
    log_unit_ = unit_ ? merged.unit_exponent * kLn2 + ::log(merged.unit_sum) : log_student_;
    log_inside_ = merged.inside_exponent * kLn2 + ::log(merged.inside_sum);
    this->restore_measured(merged);
  }
  void measure() {
    this->measure_label();
    if (!call_.measures && !call_.student_entropy) return;
    const double rate = row_.student.inverse_temperature();
    double moment = 0, unused = 0;
    const int32_t* id = indices_;
    for (int64_t k = 0; k < tiles_; ++k)
      moments(without_ids(k, &id), padded(end(k) - begin(k)), row_.student, 0, &moment, &unused);
    if (log_tail_ != -kInfinity)
      expected_student_ =
          ::exp(log_tail_ - log_student_) * (row_.student.max + moment / sums_.student);
    for (int64_t i = 0; i < count_; ++i)
      expected_student_ += z_[i] == -kInfinity ? 0 : ::exp(z_[i] * rate - log_student_) * z_[i];
  }
  static double power(const Reference<F>& r, F x) { return ::exp2((double)x * r.scale - r.whole); }
  static double log_sum(const Reference<F>& r, double sum) {
    return r.seen ? r.log_sum(sum) : -kInfinity;
  }
  // log-probability of what Reference makes 1
  double log_one(const Reference<F>& r, double log_sum) const { return r.whole * kLn2 - log_sum; }

  // Over the ids and, in a whole row, the tail; else that is added where the pieces' sums are.
  double divergence() {
    const double rate = row_.student.inverse_temperature();
    const double lq_tail = call_.tail == Tail::bucket ? log_tail_ - log_student_ : -kInfinity;
    lp_tail_ =
        log_tail_ == -kInfinity && ::exp(lp_[count_]) <= call_.rounding ? -kInfinity : lp_[count_];
    log_base_ = log_student_;
    if (conditional())
      log_base_ = log_inside_ + (log_student_ - log_student_);  // NaN, if it is one
    for (int64_t i = 0; i < count_; ++i) lq_[i] = z_[i] * rate - log_base_;
    const bool whole = call_.verb == Verb::rows;
    lp_[count_] = whole ? lp_tail_ : -kInfinity, lq_[count_] = whole ? lq_tail : -kInfinity;
    double sum = categories(lp_, lq_, entry_grad_, padded_);
    if (call_.tail == Tail::generalized) sum += measure_term();
    if (call_.verb == Verb::finish) sum = sum_with_tail(lq_tail);
    else
      for (int64_t i = 0; i <= count_; ++i) grad_sum_ += entry_grad_[i];
    if (call_.tail == Tail::generalized && sum < 0) sum = 0;  // rounding
    return outside_ && call_.verb != Verb::finish ? sum + outside() : sum;
  }
  // c (q - p), which makes of a divergence one of measures: c as in
  // fusedkd.divergences.measure_term.
  double measure_term() {
    double one[kEntryStep], grad[kEntryStep];
    for (int64_t i = 0; i < kEntryStep; ++i) one[i] = 0;
    categories(one, one, grad, kEntryStep);
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double q = -grad[0] * ::exp(lq_[i]);
      sum += q + grad[0] * ::exp(lp_[i]), entry_grad_[i] += q;
    }
    return sum;
  }
  double sum_with_tail(double lq_tail) {
    double lp[kEntryStep], lq[kEntryStep], grad[kEntryStep];
    for (int64_t i = 0; i < kEntryStep; ++i) lp[i] = lq[i] = -kInfinity;
    lp[0] = lp_tail_, lq[0] = lq_tail;
    const double value = categories(lp, lq, grad, kEntryStep);
    entry_grad_[count_] = grad[0];
    grad_sum_ = call_.comparison[n_].slope + grad[0];
    return call_.comparison[n_].value + value;
  }
  double categories(const double* lp, const double* lq, double* grad, int64_t n) const {
    return kEntries[call_.divergence](call_.parameters, this->weights_, lp, lq, grad, n);
  }

  // The middle sweep of dense rows over the entries that are no ids, where p = 0.
  double outside() {
    Middle<F> m;
    m.over_student = ::exp(log_one(row_.student, log_student_)), m.over_teacher = 1;
    m.log_student = Exact<F>(log_one(row_.student, log_student_));
    m.student_rate = (F)row_.student.inverse_temperature(), m.teacher_rate = 1;
    m.far_student = Exact<F>(row_.student.max * row_.student.inverse_temperature() - log_student_);
    m.parameters = call_.parameters;
    row_.teacher = Reference<F>(), row_.teacher.scale = row_.ratio = 1;
    for (X& x : teacher_.buffer) put(-(F)kInfinity, &x);
    const int32_t* id = indices_;
    for (int64_t k = 0; k < tiles_; ++k) {
      Tile<X> t = this->tile(k, false);
      t.student = without_ids(k, &id), t.teacher = teacher_.buffer;
      this->listed_.middle(X())[true](t, row_, m);
    }
    grad_sum_ += m.grad;
    return m.value;
  }

  // The teacher's entropy and top are those of all its ids, wherever they lie.
  struct Teacher {
    double entropy, most;
    int64_t top;
  };
  Teacher teacher() const {
    const int32_t* ids = call_.indices + n_ * call_.entries;
    const double* log_probs = call_.log_probs + n_ * (call_.entries + 1);
    Teacher t{entropy_of(lp_tail_), -kInfinity, -1};
    for (int64_t i = 0; i < call_.entries; ++i) {
      t.entropy += entropy_of(log_probs[i]);
      if (log_probs[i] > t.most) t.most = log_probs[i], t.top = ids[i];
    }
    return t;
  }
  void report(double kd, double ce) {
    const Teacher t = teacher();
    this->top_teacher_ = t.top;
    this->put_metrics(kd, ce, t.entropy, this->student_entropy(),
                      ::exp(log_inside_ - log_student_));
  }
  RuleNumbers known(double kd) const {
    const Teacher t = teacher();
    const double top = all_.max * row_.student.inverse_temperature() - log_student_;
    return {kd,         t.entropy, this->student_entropy(), this->label_log_prob(), ::exp(t.most),
            ::exp(top), {}};
  }
  static double entropy_of(double lp) { return lp == -kInfinity ? 0 : -::exp(lp) * lp; }

  // Outside the ids d loss / d s = A q + C q_1 + ..., with the tail's derivative as part of A.
  void gradient(double weight) {
    const double soft = weight * this->kd_scale_ / call_.temperature;
    const Hard hard = this->hard(weight);
    const bool separate = unit_ && hard.both() != 0;
    double student = 0;
    if (soft != 0 && !conditional())
      student = -soft * grad_sum_ * ::exp(log_one(row_.student, log_student_));
    if (tail() && row_.student.seen) student += soft * entry_grad_[count_] / sums_.student;
    double unit = hard.both() == 0
                      ? 0
                      : hard.both() * ::exp(log_one(unit_ ? row_.unit : row_.student, log_unit_));
    if (!separate) student += unit;
    const Coefficients c{
        -hard.ce * call_.label_smoothing / call_.vocabulary, student, soft, 0, 0, 0, unit};
    if (const double every = student + unit + log_student_;
        every - every != 0) {  // the row holds a NaN
      fill(call_.grad.dtype, __builtin_nan(""), grad_, call_.columns);
    } else {
      double slope = 0;
      const bool label_outside = hard.ce != 0 && this->owns_label() && !is_id(label_);
      const double reaching = conditional() ? 0 : soft;  // what is no id
      const double label = label_outside ? label_outside_gradient(reaching, hard, &slope) : 0;
      const Kind kind = outside_ && soft != 0 ? kEntrywise : kNone;
      const double reach = c.reach(kind, separate);
      if (reaching == 0 && hard.ce == 0 && hard.z == 0) this->zero(0, call_.columns);
      else
        for (int64_t k = 0; k < tiles_; ++k) this->gradient_tile(k, kind, separate, c, reach);
      if (label_outside) put(label_, student_label_, label * slope);
      for (int64_t i = 0; i < count_; ++i)
        put(column(i), z_[i],
            slopes_[i] * at(column(i), z_[i], soft == 0 ? 0 : entry_grad_[i], soft, hard));
    }
    this->zero(call_.columns, call_.grad_columns);
  }
  bool tail() const { return call_.tail == Tail::bucket && kind_ != kNone; }
  bool conditional() const { return call_.tail == Tail::conditional && kind_ != kNone; }
  bool is_id(int64_t column) const {
    const int32_t* id = ids_until(indices_, column);
    return id < indices_ + count_ && *id == column + call_.offset;
  }

  // The gradient of one logit in fp64; `own` is d value / d log q of its entry.
  double at(int64_t column, double z, double own, double soft, Hard hard) const {
    double g = 0;
    if (soft != 0)
      g = soft * (own - ::exp(z * row_.student.inverse_temperature() - log_base_) * grad_sum_);
    if (hard.ce == 0 && hard.z == 0) return g;
    const double smoothing = call_.label_smoothing,
                 q = ::exp(z * row_.unit.inverse_temperature() - log_unit_);
    g += hard.z * q;
    return g +
           hard.ce * (q - (column == label_ ? 1 - smoothing : 0) - smoothing / call_.vocabulary);
  }
  double label_outside_gradient(double soft, Hard hard, double* slope) const {
    const double z = logit(call_.student, student_.row, label_, slope);
    double own = 0;
    if (tail())
      own = entry_grad_[count_] * ::exp(z * row_.student.inverse_temperature() - log_tail_);
    if (outside_ && soft != 0) {
      int64_t k = 0;
      while (end(k) <= label_) ++k;
      own = kept(k)[Fmt::slot(label_ - begin(k))];
    }
    return at(label_, z, own, soft, hard);
  }
  void put(int64_t column, double z, double g) {
    if (z == -kInfinity) g = 0;
    write(call_.grad.dtype, &g, grad_ + column * size_of(call_.grad.dtype), 1);
  }

  const int32_t* indices_;
  int64_t padded_, count_ = 0;
  double *z_, *slopes_, *lp_, *lq_, *entry_grad_;
  double log_tail_, lp_tail_ = -kInfinity;
  double log_inside_ = -kInfinity;  // of the student's exponentials at the ids, where it is wanted
  double log_base_ = 0;             // and of those that what is compared are shares of
  Reference<F> all_;                // the largest logit, ids among them
  bool outside_;
};

template <class X> void row_of(const RowsCall& call, const Workspace& work, int64_t n) {
  if (call.indices) {
    SparseRow<X> row(call, work, n);
    return compute(row, call);
  }
  OneRow<X> row(call, work, n, call.exact);
  compute(row, call);
}
inline void row(const RowsCall& call, const Workspace& work, int64_t n) {
  if (call.wide || call.exact) return row_of<double>(call, work, n);
  if (native_bf16(call)) return row_of<uint16_t>(call, work, n);
  row_of<float>(call, work, n);
}

#if defined(FUSEDKD_POINTWISE)  // a library of one divergence has no other rows
constexpr InstructionSet kSet = {
    FUSEDKD_STRING(FUSEDKD_ISA), find, disjoint, keeps, row, scale, nullptr, nullptr, nullptr};
#else
constexpr InstructionSet kSet = {FUSEDKD_STRING(FUSEDKD_ISA),
                                 find,
                                 disjoint,
                                 keeps,
                                 row,
                                 scale,
                                 softmax_row,
                                 top_row,
                                 rule_factor};
#endif

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
