// One row: which sweeps it takes and what they must be told. A sweep is linear in V, this is not;
// sums here are fp64.
#pragma once

#include "tables.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

FUSEDKD_INLINE const char* row_start(const Logits& side, int64_t tokens, int64_t row) {
  int64_t offset = row / tokens * side.stride_batch + row % tokens * side.stride_token;
  return (const char*)side.data + offset * size_of(side.dtype);
}

// Tiles of one side. Where memory already holds what the sweeps read, that; else a converted,
// padded copy.
template <class X> struct Side {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  const Logits& logits;
  const char *row, *next;
  bool as_is;
  alignas(64) X buffer[kTile<X> + Fmt::step];

  Side(const Logits& side, int64_t tokens, int64_t n, int64_t following)
      : logits(side), row(row_start(side, tokens, n)),
        next(row_start(side, tokens, following < 0 ? n : following)),
        as_is(!transforms(side) && size_of(side.dtype) == sizeof(X)) {}

  const X* get(int64_t begin, int64_t n, F padding, F* slope) {
    const char* from = row + begin * size_of(logits.dtype);
    if (as_is && n % Fmt::step == 0) return (const X*)from;
    fill_buffer(from, n, slope, buffer);
    for (int64_t i = n; i % Fmt::step != 0; ++i)
      write(sizeof(X) == 2 ? DType::bf16 : native(), &padding, buffer + i, 1);
    return buffer;
  }

 private:
  static constexpr DType native() { return sizeof(F) == 8 ? DType::f64 : DType::f32; }
  void fill_buffer(const char* from, int64_t n, F*, uint16_t* to) { memcpy(to, from, n * 2); }
  void fill_buffer(const char* from, int64_t n, F* slope, F* to) {
    read(logits.dtype, from, to, n);
    if (transforms(logits)) transform(logits, to, slope, n);
  }
};

// The order of work, for rows of both forms of teacher: all at once, or one verb of it on a piece
// of a row.
template <class Row> void compute(Row& row, const RowsCall& call) {
  const double weight = row.row_scale();
  if (weight == 0) return row.drop();
  row.plan();
  if (call.verb == Verb::rows || call.verb == Verb::observe) row.statistics();
  else row.restore();
  if (call.verb == Verb::observe) return row.measure(), row.put_statistics();
  const double kd = row.compares() ? row.divergence() : 0;
  if (call.verb == Verb::compare) return row.put_comparison(kd);
  if (row.cancels(kd)) return row.again();
  if (call.verb == Verb::rows) row.measure();
  const double ce = call.labels ? row.cross_entropy() : __builtin_nan("");
  if (call.rule != 0) row.apply_rule(row.known(kd));
  row.write_loss(weight, kd, ce);
  if (call.metrics) row.report(kd, ce);
  if (call.grad.data) row.gradient(weight);
}

template <class X> class OneRow {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;

 public:
  OneRow(const RowsCall& call, const Workspace& work, int64_t n, bool apart)
      : call_(call), work_(work), n_(n), apart_(apart), listed_(kListed[call.divergence]),
        student_(call.student, call.tokens, n, work.next),
        teacher_(call.teacher, call.tokens, n, work.next),
        grad_((char*)row_start(call.grad, call.tokens, n)) {}

  // The call's own numbers are of its accumulation type, whatever the row's is.
  double row_scale() const {
    return call_.wide ? ((const double*)call_.row_scale)[n_] : ((const float*)call_.row_scale)[n_];
  }
  void put_number(void* to, int64_t i, double x) const {
    const DType dtype = call_.wide ? DType::f64 : DType::f32;
    write(dtype, &x, (char*)to + i * size_of(dtype), 1);
  }
  void put_metrics(const Metrics& metrics) const {
    for (int i = 0; i < kMetrics; ++i)
      put_number(call_.metrics, n_ * kMetrics + i, ((const double*)&metrics)[i]);
  }
  void drop() {
    if (call_.verb == Verb::observe) return void(call_.statistics[n_] = {});
    if (call_.verb == Verb::compare) return void(call_.comparison[n_] = {});
    put_number(call_.loss, n_, 0);
    if (call_.metrics) put_metrics(Metrics{});
    if (call_.grad.data) zero(0, call_.grad_columns);
  }
  // Between the sweeps: a factor on the row's divergence, NaN where that is. Rounding does not take
  // the numbers out of their ranges.
  void apply_rule(RuleNumbers known) {
    auto at_least = [](double least, double* x) { *x = *x < least ? least : *x; };
    auto at_most = [](double most, double* x) { *x = *x > most ? most : *x; };
    at_least(0, &known.divergence), at_least(0, &known.teacher_entropy),
        at_least(0, &known.student_entropy), at_most(0, &known.label_log_prob),
        at_most(1, &known.teacher_top1), at_most(1, &known.student_top1);
    memcpy(known.parameters, call_.rule_parameters, sizeof known.parameters);
    const bool number = known.divergence == known.divergence;
    kd_scale_ *=
        number ? call_.rule_factor(*(const Tape*)(uintptr_t)call_.rule, known) : known.divergence;
  }
  RuleNumbers known(double kd) const {
    return {kd,
            teacher_entropy(),
            student_entropy(),
            label_log_prob(),
            ::exp(row_.teacher.max * row_.teacher.inverse_temperature() - log_teacher_),
            ::exp(row_.student.max * row_.student.inverse_temperature() - log_student_),
            {}};
  }
  double label_log_prob() const {
    return student_label_ * row_.student.inverse_temperature() - log_student_;
  }
  void write_loss(double weight, double kd, double ce) {
    double loss = 0;
    if (kd_scale_ != 0) loss += kd_scale_ * kd;
    if (call_.ce_weight != 0) loss += call_.ce_weight * ce;
    if (call_.z_loss_weight != 0) loss += call_.z_loss_weight * log_unit_ * log_unit_;
    put_number(call_.loss, n_, weight * loss);
  }
  // Temperatures as the exponentials see them, rounded to F: the row is computed consistently at
  // those.
  void plan() {
    weights_ = listed_.kl ? listed_.kl(call_.parameters) : KlWeights{0, 0};
    kind_ = kEntrywise;
    if (listed_.kl)
      kind_ = (Kind)((weights_.forward > 0 ? kForward : 0) | (weights_.reverse > 0 ? kReverse : 0));
    if (call_.kd_scale == 0 && !call_.measures) kind_ = kNone;
    row_.unit.scale = (F)kLog2E;
    row_.student.scale = kind_ == kNone ? row_.unit.scale : (F)(kLog2E / call_.temperature);
    row_.teacher.scale = (F)(kLog2E / call_.teacher_temperature);
    row_.ratio = row_.teacher.scale / row_.student.scale;
    const bool labelled = call_.labels && (call_.ce_weight != 0 || call_.measures);
    unit_ = (labelled || call_.z_loss_weight != 0) && row_.unit.scale != row_.student.scale;
    // Streaming stores want whole cache lines: a short first tile takes up what lies before the
    // first of them. It goes by the student's address, so that the same input is added up in the
    // same order whatever becomes of the gradient.
    const int64_t size = size_of(call_.student.dtype), past = (intptr_t)student_.row % 64;
    head_ = student_.as_is && call_.columns >= kStreamed && past % size == 0
                ? (64 - past) % 64 / size
                : 0;
    stream_ = call_.grad.data && call_.stream && writes_directly() &&
              ((intptr_t)grad_ + head_ * size) % 64 == 0;
    // What is left after whole vectors is a tile of its own: it takes the slow sweeps because of
    // its padding.
    body_ = (call_.columns - head_) / Fmt::step * Fmt::step;
    whole_ = (head_ > 0) + (body_ + kTile<X> - 1) / kTile<X>;
    tiles_ = whole_ + (head_ + body_ < call_.columns);
    if (call_.labels) label_ = call_.labels[n_] - call_.offset;
  }
  bool writes_directly() const {
    return !transforms(call_.student) && size_of(call_.grad.dtype) == sizeof(X);
  }

  int64_t begin(int64_t k) const {
    if (k >= whole_) return head_ + body_;
    return head_ == 0 ? k * kTile<X> : k == 0 ? 0 : head_ + (k - 1) * kTile<X>;
  }
  int64_t end(int64_t k) const { return k + 1 == tiles_ ? call_.columns : begin(k + 1); }
  static int64_t padded(int64_t n) { return (n + Fmt::step - 1) / Fmt::step * Fmt::step; }
  F* kept(int64_t k) const {
    int64_t shift = k > 0 ? padded(head_) - head_ : 0;
    return work_.kept ? (F*)work_.kept + begin(k) + shift : nullptr;
  }
  F* minima(int64_t k) const { return (F*)work_.minima + 2 * k; }

  Tile<X> tile(int64_t k, bool teacher, F* slope = nullptr) {
    const int64_t from = begin(k), n = end(k) - from;
    Tile<X> t;
    t.student = student_.get(from, n, -(F)kInfinity, slope);
    t.teacher = teacher ? teacher_.get(from, n, -(F)kInfinity, nullptr) : t.student;
    t.kept = kept(k);
    t.n = padded(n);
    t.ahead = k + 1 < tiles_ ? n : 0;
    t.next_student = student_.as_is ? (const X*)student_.next + from : t.student;
    t.next_teacher = kind_ != kNone && teacher_.as_is ? (const X*)teacher_.next + from : t.teacher;
    return t;
  }
  double common_gap() const { return (double)row_.teacher.max * row_.ratio - row_.student.max; }
  // Whether a tile needs the sweeps that cut their arguments and look for infinities.
  bool far(int64_t k, bool teacher, double reach = kReach) const {
    const F* lo = minima(k);
    if (teacher && !(::fabs(common_gap()) < kCommon)) return true;
    return !(row_.student.near(lo[0], reach) && (!unit_ || row_.unit.near(lo[0], reach)) &&
             (!teacher || row_.teacher.near(lo[1], reach)));
  }

  bool compares() const { return kind_ != kNone; }
  bool owns_label() const { return 0 <= label_ && label_ < call_.columns; }
  // A tile's extremes, for far(). In a whole row the first sweep has left them; in a piece those of
  // all rows do for most.
  void bounds(int64_t k, const Tile<X>& t, bool teacher, double reach) {
    if (call_.verb == Verb::rows) return;
    F hi, *lo = minima(k);
    lo[0] = lowest_student_, lo[1] = lowest_teacher_;
    if (end(k) - begin(k) == t.n && !far(k, teacher, reach)) return;
    extremes(t.student, t.n, lo, &hi);
    if (teacher) extremes(t.teacher, t.n, lo + 1, &hi);
  }
  F lowest(int side) const {
    F lo = 0;
    for (int64_t k = 0; k < tiles_; ++k)
      if ((end(k) - begin(k)) % Fmt::step == 0 && !(minima(k)[side] >= lo)) lo = minima(k)[side];
    return lo;
  }

  // First sweep: each tile's extremes, then its exponentials relative to the largest logit so far,
  // while it is in L1.
  void statistics() {
    const bool teacher = kind_ != kNone;
    for (int64_t k = 0; k < tiles_; ++k) {
      const Tile<X> t = tile(k, teacher);
      F hi;
      extremes(t.student, t.n, minima(k), &hi);
      if (!(hi <= row_.student.max) || !row_.student.seen) peak_tile_ = k;
      if (call_.measures) best(t.student, begin(k), end(k), hi, row_.student, &top_student_);
      const double by = row_.student.advance(hi), by_unit = row_.unit.advance(hi);
      sums_.student *= by, sums_.reverse *= by, sums_.student_absent *= by, sums_.unit *= by_unit;
      if (teacher) {
        extremes(t.teacher, t.n, minima(k) + 1, &hi);
        if (call_.measures) best(t.teacher, begin(k), end(k), hi, row_.teacher, &top_teacher_);
        const double by_teacher = row_.teacher.advance(hi);
        sums_.teacher *= by_teacher, sums_.forward *= by_teacher,
            sums_.teacher_absent *= by_teacher;
      }
      Runs<X>::statistics[kind_][unit_][far(k, teacher)](t, row_, sums_);
    }
    normalise();
    top_student_ += call_.offset, top_teacher_ += call_.offset;
  }
  void normalise() {
    const bool teacher = kind_ != kNone;
    log_student_ = row_.student.log_sum(sums_.student);
    log_unit_ = unit_ ? row_.unit.log_sum(sums_.unit) : log_student_;
    log_teacher_ = teacher ? row_.teacher.log_sum(sums_.teacher) : 0;
    // gap = (t ratio - s) / T + this; the last term makes up for the rounding of the ratio, at the
    // largest logit
    const double excess = (row_.teacher.scale - (double)row_.ratio * row_.student.scale) * kLn2;
    gap_ = log_student_ - log_teacher_ + (excess != 0 ? excess * row_.teacher.max : 0);
  }
  // What label and metrics need of the logits: the label's, their mean, those that p and q expect.
  void measure() {
    measure_label();
    if (call_.measures || call_.student_entropy)
      expected_student_ = expected(student_, row_.student, sums_.student);
    if (call_.measures || call_.teacher_entropy)
      expected_teacher_ = expected(teacher_, row_.teacher, sums_.teacher);
  }
  void measure_label() {
    double slope, unused = 0;
    if (call_.labels && owns_label())
      student_label_ = logit(call_.student, student_.row, label_, &slope);
    if (call_.labels && call_.label_smoothing != 0) {
      for (int64_t k = 0; k < tiles_; ++k)
        moments(padded_tile(student_, k, row_.student), padded(end(k) - begin(k)), row_.student,
                1.0 / call_.vocabulary, &unused, &mean_);
      mean_ += row_.student.max * (call_.columns / (double)call_.vocabulary);
    }
  }
  const X* padded_tile(Side<X>& side, int64_t k, const Reference<F>& r) {
    return side.get(begin(k), end(k) - begin(k), r.max, nullptr);
  }
  double expected(Side<X>& side, const Reference<F>& r, double sum) {
    double moment = 0, unused = 0;
    for (int64_t k = 0; k < tiles_; ++k)
      moments(padded_tile(side, k, r), padded(end(k) - begin(k)), r, 0, &moment, &unused);
    return sum == 0 ? 0 : r.max + moment / sum;
  }

  // The row's statistics go to whoever merges its pieces; exponents and sums are as Reference has
  // them.
  void put_statistics() {
    const Reference<F>&s = row_.student, &t = row_.teacher, &u = row_.unit;
    fusedkd::Statistics& put = call_.statistics[n_];
    put = {};
    put.student_max = most(s), put.student_exponent = exponent(s), put.student_sum = sums_.student;
    put.unit_exponent = exponent(u), put.unit_sum = sums_.unit;
    put.teacher_max = most(t), put.teacher_exponent = exponent(t), put.teacher_sum = sums_.teacher;
    put.forward = sums_.forward, put.reverse = sums_.reverse;
    put.teacher_absent = sums_.teacher_absent, put.student_absent = sums_.student_absent;
    put.only_teacher = sums_.only_teacher, put.only_student = sums_.only_student;
    put_measured(put);
    if (compares()) put.teacher_min = lowest(1);
    if (peaks()) put.teacher_at_top = teacher_at_peak();
  }
  void put_measured(fusedkd::Statistics& put) const {
    put.student_expected = expected_student_, put.teacher_expected = expected_teacher_;
    put.student_min = lowest(0);
    put.mean = mean_, put.label = student_label_, put.student_top = top_student_,
    put.teacher_top = top_teacher_;
  }
  static double most(const Reference<F>& r) { return r.seen ? r.max : -kInfinity; }
  static double exponent(const Reference<F>& r) { return r.seen ? r.whole : -kInfinity; }
  // As if all pieces had been swept here.
  void restore() {
    const fusedkd::Statistics& merged = call_.statistics[n_];
    row_.student.advance((F)merged.student_max), row_.unit.advance((F)merged.student_max);
    row_.teacher.advance((F)merged.teacher_max);
    sums_.student = merged.student_sum, sums_.unit = merged.unit_sum,
    sums_.teacher = merged.teacher_sum;
    sums_.forward = merged.forward, sums_.reverse = merged.reverse;
    sums_.teacher_absent = merged.teacher_absent, sums_.student_absent = merged.student_absent;
    sums_.only_teacher = (F)merged.only_teacher, sums_.only_student = (F)merged.only_student;
    restore_measured(merged);
    normalise();
  }
  void restore_measured(const fusedkd::Statistics& merged) {
    expected_student_ = merged.student_expected, expected_teacher_ = merged.teacher_expected;
    lowest_student_ = (F)merged.student_min, lowest_teacher_ = (F)merged.teacher_min;
    mean_ = merged.mean, student_label_ = merged.label;
    top_student_ = (int64_t)merged.student_top, top_teacher_ = (int64_t)merged.teacher_top;
  }
  void put_comparison(double kd) const { call_.comparison[n_] = {kd, grad_sum_}; }
  // The row once more, with more digits: here, or by whoever holds the other pieces.
  void again() const {
    if (call_.verb == Verb::finish) {
      call_.again[n_] = true;
      put_number(call_.loss, n_, 0);
      if (call_.metrics) put_metrics(Metrics{});
      return;
    }
    OneRow<double> row(call_, work_, n_, true);
    compute(row, call_);
  }

  // Whether p and q hardly meet: what an entry gives and the sum, nearly the same for all that q
  // has, then leave a small difference, of which fp32 keeps little. A KL is never near its largest
  // value: there q's peak tells, which p has not.
  bool cancels(double kd) {  // whether a gradient is wanted or not: the loss is the same
    if (sizeof(F) == sizeof(double) || call_.kd_scale == 0 || kind_ == kNone || kind_ == kForward)
      return false;
    if (kind_ == kEntrywise) return kd > (1 - kMeeting) * call_.disjoint;
    if (!peaks()) return false;
    const double at_peak =
        call_.verb == Verb::finish ? call_.statistics[n_].teacher_at_top : teacher_at_peak();
    return at_peak * row_.teacher.inverse_temperature() - log_teacher_ < -kLn2;
  }
  bool peaks() const {
    if (kind_ == kEntrywise || !(kind_ & kReverse) || !row_.student.seen) return false;
    return row_.student.shift > (1 - kRest) * sums_.student;
  }
  double teacher_at_peak() {
    int64_t peak = begin(peak_tile_);
    const Tile<X> t = tile(peak_tile_, false);
    for (int64_t i = 0; i < t.n && value(t.student[i]) != row_.student.max; ++i) ++peak;
    double unused;
    return logit(call_.teacher, teacher_.row, peak < call_.columns ? peak : 0, &unused);
  }
  static void best(const X* x, int64_t from, int64_t to, F hi, const Reference<F>& so_far,
                   int64_t* index) {
    if (so_far.seen && !(hi > so_far.max)) return;
    *index = from;
    for (int64_t i = 0; i < to - from; ++i) {
      if (value(x[i]) != hi) continue;
      *index = from + i;
      return;
    }
  }
  static float value(uint16_t x) { return from_bf16(x); }
  static float value(float x) { return x; }
  static double value(double x) { return x; }

  double divergence() {
    if (kind_ == kEntrywise) return call_.verb == Verb::finish ? compared() : middle();
    const double rate = row_.student.inverse_temperature(), unit = rate * kGapUnit;
    if (gap_ - gap_ != 0) return __builtin_nan("");  // a NaN or +inf among the logits
    const double missing = sums_.teacher_absent / sums_.teacher,
                 extra = sums_.student_absent / sums_.student;
    const double forward = unit * (sums_.forward / sums_.teacher) + gap_ * (1 - missing);
    finite_reverse_ = -unit * (sums_.reverse / sums_.student) - gap_ * (1 - extra);
    // p counts as 0 where fp64 says so, also where fp32 has long run out of range
    const bool forward_infinite =
        sums_.only_teacher * row_.teacher.inverse_temperature() - log_teacher_ > kLogSmallest;
    const bool reverse_infinite = sums_.only_student * rate - log_student_ > kLogSmallest;
    double sum = 0;
    if (weights_.forward > 0) sum += weights_.forward * (forward_infinite ? kInfinity : forward);
    if (weights_.reverse > 0)
      sum += weights_.reverse * (reverse_infinite ? kInfinity : finite_reverse_);
    return sum;
  }

  double compared() {
    grad_sum_ = call_.comparison[n_].slope;
    return call_.comparison[n_].value;
  }

  // Second sweep, for divergences given entry by entry: their sum, and that of their gradients.
  double middle() {
    Middle<F> m;
    const double rate_s = row_.student.inverse_temperature(),
                 rate_t = row_.teacher.inverse_temperature();
    const double far_s = row_.student.max * rate_s - log_student_,
                 far_t = row_.teacher.max * rate_t - log_teacher_;
    m.over_student = 1 / sums_.student, m.over_teacher = 1 / sums_.teacher;
    m.log_student = Exact<F>(-::log(sums_.student)),
    m.log_teacher = Exact<F>(-::log(sums_.teacher));
    m.far_student = Exact<F>(far_s), m.far_teacher = Exact<F>(far_t);
    m.student_rate = (F)rate_s, m.teacher_rate = (F)rate_t;
    m.gap = Exact<F>(gap_), m.far_gap = Exact<F>(far_t - far_s);
    m.parameters = call_.parameters, m.apart = apart_;
    const double reach = kReach + ::log2(::fmax(sums_.student, sums_.teacher));
    for (int64_t k = 0; k < tiles_; ++k) {
      const Tile<X> t = tile(k, true);
      bounds(k, t, true, reach);
      listed_.middle(X())[far(k, true, reach)](t, row_, m);
    }
    grad_sum_ = m.grad;
    return m.value;
  }

  double cross_entropy() const {
    const double smoothing = call_.label_smoothing, rate = row_.unit.inverse_temperature();
    const double ce = log_unit_ - rate * student_label_;
    return smoothing == 0 ? ce : (1 - smoothing) * ce + smoothing * (log_unit_ - rate * mean_);
  }

  void report(double kd, double ce) const {
    put_metrics(kd, ce, teacher_entropy(), student_entropy());
  }
  double teacher_entropy() const {
    return log_teacher_ - row_.teacher.inverse_temperature() * expected_teacher_;
  }
  double student_entropy() const {
    return log_student_ - row_.student.inverse_temperature() * expected_student_;
  }
  void put_metrics(double kd, double ce, double teacher_entropy, double student_entropy,
                   double student_mass = __builtin_nan("")) const {
    const bool agree = top_student_ == top_teacher_;
    const double unknown = __builtin_nan(""), label = (double)(label_ + call_.offset);
    const double student_right = call_.labels ? top_student_ == label : unknown;
    const double teacher_right = call_.labels ? top_teacher_ == label : unknown;
    put_metrics({kd, ce, teacher_entropy, student_entropy, (double)agree, student_right,
                 teacher_right, student_mass});
  }

  // What the softmax at T = 1 is multiplied with in the gradient: by the cross-entropy, which has
  // the label's as well, and by the z-loss.
  struct Hard {
    double ce, z;
    double both() const { return ce + z; }
  };
  Hard hard(double weight) const {
    Hard of{0, 0};
    if (call_.ce_weight != 0) of.ce = weight * call_.ce_weight;
    if (call_.z_loss_weight != 0) of.z = 2 * weight * call_.z_loss_weight * log_unit_;
    return of;
  }

  // Last sweep: d loss / d s = A q + B p + C q_1 + ..., coefficients from the sums.
  void gradient(double weight) {
    const double soft = weight * kd_scale_ / call_.temperature;
    const Hard hard = this->hard(weight);
    const double per_student = soft / sums_.student;
    Kind kind = kind_;
    if (kd_scale_ == 0) {  // statistics may have been wanted for the metrics, or by a rule
      kind = kNone;
      row_.student = row_.unit;
    }
    double student = 0, gap = 0, teacher = 0, at_gap = 0,
           unit = hard.both() == 0 ? 0 : hard.both() / (unit_ ? sums_.unit : sums_.student);
    if (kind == kEntrywise) student = -per_student * grad_sum_, teacher = soft;
    if (kind & kForward && kind != kEntrywise) {
      student += weights_.forward * per_student;
      teacher = -weights_.forward * soft / sums_.teacher;
    }
    if (kind & kReverse && kind != kEntrywise) {
      student -= weights_.reverse * per_student * finite_reverse_;
      at_gap = -weights_.reverse * per_student * gap_;
      gap = -weights_.reverse * per_student * row_.student.inverse_temperature();
    }
    const bool separate = unit_ && hard.both() != 0 && kind != kNone;
    if (!separate) student += unit;
    const Coefficients c{-hard.ce * call_.label_smoothing / call_.vocabulary,
                         student + at_gap,
                         teacher,
                         student + at_gap + gap * common_gap(),
                         student,
                         gap,
                         unit};
    if (const double all = student + at_gap + teacher + gap + unit;
        all - all != 0) {  // the row holds a NaN
      fill(call_.grad.dtype, __builtin_nan(""), grad_, call_.columns);
    } else {
      const bool labelled = hard.ce != 0 && owns_label();
      double slope = 0, label = labelled ? label_gradient(kind, soft, hard, &slope) : 0;
      const double reach = c.reach(kind, separate);
      for (int64_t k = 0; k < tiles_; ++k) gradient_tile(k, kind, separate, c, reach);
      if (labelled) {
        label = student_label_ == -kInfinity ? 0 : label * slope;  // where it may be no number
        write(call_.grad.dtype, &label, grad_ + label_ * size_of(call_.grad.dtype), 1);
      }
    }
    zero(call_.columns, call_.grad_columns);
  }

  void gradient_tile(int64_t k, Kind kind, bool separate, const Coefficients& c, double reach) {
    const bool teacher = kind != kNone && kind != kEntrywise, sloped = transforms(call_.student);
    const int64_t from = begin(k), n = end(k) - from;
    char* to = grad_ + from * size_of(call_.grad.dtype);
    Tile<X> t = tile(k, teacher, sloped ? (F*)slope_ : nullptr);
    bounds(k, t, teacher, reach);
    const bool direct = writes_directly() && n % Fmt::step == 0;
    t.grad = direct ? (X*)to : out_;
    t.stream = direct && stream_;
    Runs<X>::gradient[kind][separate][far(k, teacher, reach)](t, row_, c);
    if (!direct) finish(out_, to, n);
  }
  void finish(uint16_t* from, char* to, int64_t n) { memcpy(to, from, n * sizeof *from); }
  void finish(F* from, char* to, int64_t n) {
    if (transforms(call_.student))
      for (int64_t i = 0; i < n; ++i) from[i] *= ((F*)slope_)[i];
    write(call_.grad.dtype, from, to, n);
  }

  // The label's own entry once more in fp64: q - 1 is where fp32 would cancel.
  double label_gradient(Kind kind, double soft, Hard hard, double* slope) {
    double unused, rate = row_.student.inverse_temperature();
    double s = logit(call_.student, student_.row, label_, slope);
    double smoothing = call_.label_smoothing;
    const double unit = ::exp(row_.unit.inverse_temperature() * s - log_unit_);
    double g = hard.ce * (unit - (1 - smoothing) - smoothing / call_.vocabulary) + hard.z * unit;
    if (kind == kNone) return g;
    double lq = rate * s - log_student_, q = ::exp(lq);
    if (kind == kEntrywise) {
      int64_t k = 0;
      while (end(k) <= label_) ++k;
      return g + soft * (kept(k)[Fmt::slot(label_ - begin(k))] - q * grad_sum_);
    }
    double t = logit(call_.teacher, teacher_.row, label_, &unused);
    double lp = row_.teacher.inverse_temperature() * t - log_teacher_;
    double gap = t == -kInfinity ? 0 : lq - lp;
    return g + soft * (weights_.forward * (q - ::exp(lp)) +
                       weights_.reverse * q * (gap - finite_reverse_));
  }

  void zero(int64_t from, int64_t to) {
    memset(grad_ + from * size_of(call_.grad.dtype), 0, (to - from) * size_of(call_.grad.dtype));
  }

  static constexpr double kReach = 20;  // powers of two, see Reference::near
  static constexpr double kMeeting = 1. / 4096,
                          kRest = 1. / 128;  // of what fp32 would keep 12 and 17 bits
  static constexpr double kCommon =
      64;  // gap between the largest logits that costs fp32 too many digits
  static constexpr int64_t kStreamed = 8192;  // shorter rows would feel the extra tile
  static constexpr double kLogSmallest = -745.1332191019412;  // of fp64: below it exp is 0
  const RowsCall& call_;
  const Workspace& work_;
  const int64_t n_;
  const bool apart_;  // p and q hardly meet
  const Listed& listed_;
  Side<X> student_, teacher_;
  char* grad_;
  Kind kind_;
  KlWeights weights_;
  double kd_scale_ = call_.kd_scale;  // and a row rule's factor
  bool unit_, stream_;
  int64_t head_, body_, whole_, tiles_;
  Row<F> row_;
  Sums<F> sums_;
  double log_student_, log_teacher_, log_unit_, gap_, finite_reverse_ = 0, grad_sum_ = 0;
  double student_label_ = 0, mean_ = 0, expected_student_ = 0, expected_teacher_ = 0;
  int64_t label_ = -1, top_student_ = 0, top_teacher_ = 0, peak_tile_ = 0;
  F lowest_student_ = 0, lowest_teacher_ = 0;
  alignas(64) F slope_[kTile<X> + Fmt::step];
  alignas(64) X out_[kTile<X> + Fmt::step];
};

// -------------------------------------------------------------------------------------------------

inline bool native_bf16(const RowsCall& call) {
  return call.student.dtype == DType::bf16 && call.teacher.dtype == DType::bf16 &&
         !transforms(call.student) && !transforms(call.teacher) &&
         (call.grad.data == nullptr || call.grad.dtype == DType::bf16);
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
