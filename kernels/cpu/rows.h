// One row: which sweeps it takes and what they must be told. A sweep is linear in V, this is not; sums here are fp64.
#pragma once

#include "entries.h"
#include "sweeps.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// ---------------------------------------------------------------------------------------------------------------------
// tables over what is known only at run time

template <class X>
using StatisticsRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&, Sums<typename Format<X>::F>&);
template <class X>
using MiddleRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&, Middle<typename Format<X>::F>&);
template <class X>
using GradientRun = void (*)(const Tile<X>&, const Row<typename Format<X>::F>&, const Coefficients&);

#define FUSEDKD_FLAVOURS(run_of, X, kind)                                  \
  {                                                                        \
    {run_of<X, kind, false, false>::run, run_of<X, kind, false, true>::run}, \
    {run_of<X, kind, true, false>::run, run_of<X, kind, true, true>::run}    \
  }
#define FUSEDKD_KINDS(run_of, X)                                                                         \
  {                                                                                                      \
    FUSEDKD_FLAVOURS(run_of, X, kNone), FUSEDKD_FLAVOURS(run_of, X, kForward),                           \
        FUSEDKD_FLAVOURS(run_of, X, kReverse), FUSEDKD_FLAVOURS(run_of, X, kBoth),                       \
        FUSEDKD_FLAVOURS(run_of, X, kEntrywise)                                                          \
  }
template <class X>
struct Runs {  // [kind][cross-entropy at another temperature][far]
  static constexpr StatisticsRun<X> statistics[5][2][2] = FUSEDKD_KINDS(Statistics, X);
  static constexpr GradientRun<X> gradient[5][2][2] = FUSEDKD_KINDS(Gradient, X);
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
template <class D>
constexpr Listed listed(const char* name, long) {
  return {name,
          nullptr,
          {Entrywise<D, uint16_t, false>::run, Entrywise<D, uint16_t, true>::run},
          {Entrywise<D, float, false>::run, Entrywise<D, float, true>::run},
          {Entrywise<D, double, false>::run, Entrywise<D, double, true>::run}};
}
template <class>
struct List;
template <int... n>
struct List<std::integer_sequence<int, n...>> {
  static constexpr Listed all[] = {listed<typename Registered<n>::type>(Registered<n>::name, 0)...};
};
constexpr const Listed* kListed = List<std::make_integer_sequence<int, kDivergences>>::all;

// ---------------------------------------------------------------------------------------------------------------------

FUSEDKD_INLINE const char* row_start(const Logits& side, int64_t tokens, int64_t row) {
  int64_t offset = row / tokens * side.stride_batch + row % tokens * side.stride_token;
  return (const char*)side.data + offset * size_of(side.dtype);
}

// Tiles of one side. Where memory already holds what the sweeps read, that; else a converted, padded copy.
template <class X>
struct Side {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  const Logits& logits;
  const char *row, *next;
  bool as_is;
  alignas(64) X buffer[kTile<X> + Fmt::step];

  Side(const Logits& side, int64_t tokens, int64_t n, int64_t following)
      : logits(side), row(row_start(side, tokens, n)), next(row_start(side, tokens, following < 0 ? n : following)),
        as_is(!transforms(side) && size_of(side.dtype) == sizeof(X)) {}

  const X* get(int64_t begin, int64_t n, F padding, F* slope) {
    const char* from = row + begin * size_of(logits.dtype);
    if (as_is && n % Fmt::step == 0) return (const X*)from;
    fill_buffer(from, n, slope, buffer);
    for (int64_t i = n; i % Fmt::step != 0; ++i) write(sizeof(X) == 2 ? DType::bf16 : native(), &padding, buffer + i, 1);
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

template <class X>
class OneRow {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;

 public:
  OneRow(const RowsCall& call, const Workspace& work, int64_t n, bool apart = false)
      : call_(call), work_(work), n_(n), apart_(apart), listed_(kListed[call.divergence]), student_(call.student, call.tokens, n, work.next),
        teacher_(call.teacher, call.tokens, n, work.next), grad_((char*)row_start(call.grad, call.tokens, n)) {}

  void run() {
    const double weight = row_scale();
    if (weight == 0) return drop();
    plan();
    statistics();
    const double kd = kind_ == kNone ? 0 : divergence();
    if (sizeof(F) < sizeof(double) && cancels(kd)) return OneRow<double>(call_, work_, n_, true).run();
    const double ce = call_.labels ? cross_entropy() : __builtin_nan("");
    write_loss(weight, kd, ce);
    if (call_.metrics) report(kd, ce);
    if (call_.grad.data) gradient(weight);
  }

 protected:
  // The call's own numbers are of its accumulation type, whatever the row's is.
  double row_scale() const {
    return call_.wide ? ((const double*)call_.row_scale)[n_] : ((const float*)call_.row_scale)[n_];
  }
  void put_number(void* to, int64_t i, double x) const {
    const DType dtype = call_.wide ? DType::f64 : DType::f32;
    write(dtype, &x, (char*)to + i * size_of(dtype), 1);
  }
  void put_metrics(const Metrics& metrics) const {
    for (int i = 0; i < kMetrics; ++i) put_number(call_.metrics, n_ * kMetrics + i, ((const double*)&metrics)[i]);
  }
  void drop() {
    put_number(call_.loss, n_, 0);
    if (call_.metrics) put_metrics(Metrics{});
    if (call_.grad.data) zero(0, call_.grad_columns);
  }
  void write_loss(double weight, double kd, double ce) {
    double loss = 0;
    if (call_.kd_scale != 0) loss += call_.kd_scale * kd;
    if (call_.ce_weight != 0) loss += call_.ce_weight * ce;
    put_number(call_.loss, n_, weight * loss);
  }
  // Temperatures as the exponentials see them, rounded to F: the row is computed consistently at those.
  void plan() {
    weights_ = listed_.kl ? listed_.kl(call_.parameters) : KlWeights{0, 0};
    kind_ = kEntrywise;
    if (listed_.kl) kind_ = (Kind)((weights_.forward > 0 ? kForward : 0) | (weights_.reverse > 0 ? kReverse : 0));
    if (call_.kd_scale == 0 && !call_.metrics) kind_ = kNone;
    row_.unit.scale = (F)kLog2E;
    row_.student.scale = kind_ == kNone ? row_.unit.scale : (F)(kLog2E / call_.temperature);
    row_.teacher.scale = (F)(kLog2E / call_.teacher_temperature);
    row_.ratio = row_.teacher.scale / row_.student.scale;
    const bool wanted = call_.labels && (call_.ce_weight != 0 || call_.metrics);
    unit_ = wanted && row_.unit.scale != row_.student.scale;
    // Streaming stores want whole cache lines: a short first tile takes up what lies before the first of them. It goes
    // by the student's address, so that the same input is added up in the same order whatever becomes of the gradient.
    const int64_t size = size_of(call_.student.dtype), past = (intptr_t)student_.row % 64;
    head_ = student_.as_is && call_.vocabulary >= kStreamed && past % size == 0 ? (64 - past) % 64 / size : 0;
    stream_ = call_.grad.data && call_.stream && writes_directly() && ((intptr_t)grad_ + head_ * size) % 64 == 0;
    // What is left after whole vectors is a tile of its own: it takes the slow sweeps because of its padding.
    body_ = (call_.vocabulary - head_) / Fmt::step * Fmt::step;
    whole_ = (head_ > 0) + (body_ + kTile<X> - 1) / kTile<X>;
    tiles_ = whole_ + (head_ + body_ < call_.vocabulary);
  }
  bool writes_directly() const { return !transforms(call_.student) && size_of(call_.grad.dtype) == sizeof(X); }

  int64_t begin(int64_t k) const {
    if (k >= whole_) return head_ + body_;
    return head_ == 0 ? k * kTile<X> : k == 0 ? 0 : head_ + (k - 1) * kTile<X>;
  }
  int64_t end(int64_t k) const { return k + 1 == tiles_ ? call_.vocabulary : begin(k + 1); }
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

  // First sweep: each tile's extremes, then its exponentials relative to the largest logit so far, while it is in L1.
  void statistics() {
    const bool teacher = kind_ != kNone;
    for (int64_t k = 0; k < tiles_; ++k) {
      const Tile<X> t = tile(k, teacher);
      F hi;
      extremes(t.student, t.n, minima(k), &hi);
      if (!(hi <= row_.student.max) || !row_.student.seen) peak_tile_ = k;
      if (call_.metrics) best(t.student, begin(k), end(k), hi, row_.student, &top_student_);
      const double by = row_.student.advance(hi), by_unit = row_.unit.advance(hi);
      sums_.student *= by, sums_.reverse *= by, sums_.student_absent *= by, sums_.unit *= by_unit;
      if (teacher) {
        extremes(t.teacher, t.n, minima(k) + 1, &hi);
        if (call_.metrics) best(t.teacher, begin(k), end(k), hi, row_.teacher, &top_teacher_);
        const double by_teacher = row_.teacher.advance(hi);
        sums_.teacher *= by_teacher, sums_.forward *= by_teacher, sums_.teacher_absent *= by_teacher;
      }
      Runs<X>::statistics[kind_][unit_][far(k, teacher)](t, row_, sums_);
    }
    log_student_ = row_.student.log_sum(sums_.student);
    log_unit_ = unit_ ? row_.unit.log_sum(sums_.unit) : log_student_;
    log_teacher_ = teacher ? row_.teacher.log_sum(sums_.teacher) : 0;
    // gap = (t ratio - s) / T + this; the last term makes up for the rounding of the ratio, at the largest logit
    const double excess = (row_.teacher.scale - (double)row_.ratio * row_.student.scale) * kLn2;
    gap_ = log_student_ - log_teacher_ + (excess != 0 ? excess * row_.teacher.max : 0);
  }
  // Whether p and q hardly meet: what an entry gives and the sum, nearly the same for all that q has, then leave a small
  // difference, of which fp32 keeps little. A KL is never near its largest value: there q's peak tells, which p has not.
  bool cancels(double kd) {  // whether a gradient is wanted or not: the loss is the same
    if (call_.kd_scale == 0 || kind_ == kNone || kind_ == kForward) return false;
    if (kind_ == kEntrywise) return kd > (1 - kMeeting) * call_.disjoint;
    if (!(row_.student.shift > (1 - kRest) * sums_.student)) return false;
    int64_t peak = begin(peak_tile_);
    const Tile<X> t = tile(peak_tile_, false);
    for (int64_t i = 0; i < t.n && value(t.student[i]) != row_.student.max; ++i) ++peak;
    double unused, logit_t = logit(call_.teacher, teacher_.row, peak < call_.vocabulary ? peak : 0, &unused);
    return logit_t * row_.teacher.inverse_temperature() - log_teacher_ < -kLn2;
  }
  static void best(const X* x, int64_t from, int64_t to, F hi, const Reference<F>& so_far, int64_t* index) {
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
    if (kind_ == kEntrywise) return middle();
    const double rate = row_.student.inverse_temperature(), unit = rate * kGapUnit;
    if (gap_ - gap_ != 0) return __builtin_nan("");  // a NaN or +inf among the logits
    const double missing = sums_.teacher_absent / sums_.teacher, extra = sums_.student_absent / sums_.student;
    const double forward = unit * (sums_.forward / sums_.teacher) + gap_ * (1 - missing);
    finite_reverse_ = -unit * (sums_.reverse / sums_.student) - gap_ * (1 - extra);
    // p counts as 0 where fp64 says so, also where fp32 has long run out of range
    const bool forward_infinite = sums_.only_teacher * row_.teacher.inverse_temperature() - log_teacher_ > kLogSmallest;
    const bool reverse_infinite = sums_.only_student * rate - log_student_ > kLogSmallest;
    double sum = 0;
    if (weights_.forward > 0) sum += weights_.forward * (forward_infinite ? kInfinity : forward);
    if (weights_.reverse > 0) sum += weights_.reverse * (reverse_infinite ? kInfinity : finite_reverse_);
    return sum;
  }

  // Second sweep, for divergences given entry by entry: their sum, and that of their gradients.
  double middle() {
    Middle<F> m;
    const double rate_s = row_.student.inverse_temperature(), rate_t = row_.teacher.inverse_temperature();
    const double far_s = row_.student.max * rate_s - log_student_, far_t = row_.teacher.max * rate_t - log_teacher_;
    m.over_student = 1 / sums_.student, m.over_teacher = 1 / sums_.teacher;
    m.log_student = Exact<F>(-::log(sums_.student)), m.log_teacher = Exact<F>(-::log(sums_.teacher));
    m.far_student = Exact<F>(far_s), m.far_teacher = Exact<F>(far_t);
    m.student_rate = (F)rate_s, m.teacher_rate = (F)rate_t;
    m.gap = Exact<F>(gap_), m.far_gap = Exact<F>(far_t - far_s);
    m.parameters = call_.parameters, m.apart = apart_;
    const double reach = kReach + ::log2(::fmax(sums_.student, sums_.teacher));
    for (int64_t k = 0; k < tiles_; ++k) {
      Tile<X> t = tile(k, true);
      if (!call_.grad.data || call_.kd_scale == 0) t.kept = nullptr;
      listed_.middle(X())[far(k, true, reach)](t, row_, m);
    }
    grad_sum_ = m.grad;
    return m.value;
  }

  double cross_entropy() {
    double slope, smoothing = call_.label_smoothing, rate = row_.unit.inverse_temperature();
    label_ = call_.labels[n_];
    student_label_ = logit(call_.student, student_.row, label_, &slope);
    double ce = log_unit_ - rate * student_label_;
    if (smoothing == 0) return ce;
    double unused = 0, mean = 0;
    for (int64_t k = 0; k < tiles_; ++k) {
      const X* x = student_.get(begin(k), end(k) - begin(k), row_.student.max, nullptr);
      moments(x, padded(end(k) - begin(k)), row_.student, 1.0 / call_.vocabulary, &unused, &mean);
    }
    return (1 - smoothing) * ce + smoothing * (log_unit_ - rate * (row_.student.max + mean));
  }

  static double entropy(const Reference<F>& r, double log_sum, double sum, double moment) {
    return log_sum - r.inverse_temperature() * (r.max + moment / sum);
  }

  void report(double kd, double ce) {
    double of_student = 0, of_teacher = 0, unused = 0;
    for (int64_t k = 0; k < tiles_; ++k) {
      const int64_t from = begin(k), n = end(k) - from;
      moments(student_.get(from, n, row_.student.max, nullptr), padded(n), row_.student, 0, &of_student, &unused);
      moments(teacher_.get(from, n, row_.teacher.max, nullptr), padded(n), row_.teacher, 0, &of_teacher, &unused);
    }
    put_metrics(kd, ce, entropy(row_.teacher, log_teacher_, sums_.teacher, of_teacher),
                entropy(row_.student, log_student_, sums_.student, of_student));
  }
  void put_metrics(double kd, double ce, double teacher_entropy, double student_entropy) const {
    const bool agree = top_student_ == top_teacher_;
    const double unknown = __builtin_nan(""), student_right = call_.labels ? top_student_ == label_ : unknown;
    const double teacher_right = call_.labels ? top_teacher_ == label_ : unknown;
    put_metrics({kd, ce, teacher_entropy, student_entropy, (double)agree, student_right, teacher_right});
  }

  // Last sweep: d loss / d s = A q + B p + C q_1 + ..., coefficients from the sums.
  void gradient(double weight) {
    const double soft = weight * call_.kd_scale / call_.temperature;
    const double hard = call_.ce_weight != 0 ? weight * call_.ce_weight : 0;
    const double per_student = soft / sums_.student;
    Kind kind = kind_;
    if (call_.kd_scale == 0) {  // statistics may have been wanted for the metrics
      kind = kNone;
      row_.student = row_.unit;
    }
    double student = 0, gap = 0, teacher = 0, at_gap = 0, unit = hard == 0 ? 0 : hard / (unit_ ? sums_.unit : sums_.student);
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
    const bool separate = unit_ && hard != 0 && kind != kNone;
    if (!separate) student += unit;
    const Coefficients c{-hard * call_.label_smoothing / call_.vocabulary, student + at_gap, teacher,
                         student + at_gap + gap * common_gap(), student, gap, unit};
    if (const double all = student + at_gap + teacher + gap + unit; all - all != 0) {  // the row holds a NaN
      fill(call_.grad.dtype, __builtin_nan(""), grad_, call_.vocabulary);
    } else {
      double slope = 0, label = hard != 0 ? label_gradient(kind, soft, hard, &slope) : 0;
      const double reach = c.reach(kind, separate);
      for (int64_t k = 0; k < tiles_; ++k) gradient_tile(k, kind, separate, c, reach);
      if (hard != 0) {
        label = student_label_ == -kInfinity ? 0 : label * slope;  // where it may be no number
        write(call_.grad.dtype, &label, grad_ + label_ * size_of(call_.grad.dtype), 1);
      }
    }
    zero(call_.vocabulary, call_.grad_columns);
  }

  void gradient_tile(int64_t k, Kind kind, bool separate, const Coefficients& c, double reach) {
    const bool teacher = kind != kNone && kind != kEntrywise, sloped = transforms(call_.student);
    const int64_t from = begin(k), n = end(k) - from;
    char* to = grad_ + from * size_of(call_.grad.dtype);
    Tile<X> t = tile(k, teacher, sloped ? (F*)slope_ : nullptr);
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
  double label_gradient(Kind kind, double soft, double hard, double* slope) {
    double unused, rate = row_.student.inverse_temperature();
    double s = logit(call_.student, student_.row, label_, slope);
    double smoothing = call_.label_smoothing;
    double g = hard * (::exp(row_.unit.inverse_temperature() * s - log_unit_) - (1 - smoothing) -
                       smoothing / call_.vocabulary);
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
    return g + soft * (weights_.forward * (q - ::exp(lp)) + weights_.reverse * q * (gap - finite_reverse_));
  }

  void zero(int64_t from, int64_t to) {
    memset(grad_ + from * size_of(call_.grad.dtype), 0, (to - from) * size_of(call_.grad.dtype));
  }

  static constexpr double kReach = 20;   // powers of two, see Reference::near
  static constexpr double kMeeting = 1. / 4096, kRest = 1. / 128;  // of what fp32 would keep 12 and 17 bits
  static constexpr double kCommon = 64;     // gap between the largest logits that costs fp32 too many digits
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
  bool unit_, stream_;
  int64_t head_, body_, whole_, tiles_;
  Row<F> row_;
  Sums<F> sums_;
  double log_student_, log_teacher_, log_unit_, gap_, finite_reverse_ = 0, grad_sum_ = 0, student_label_ = 0;
  int64_t label_ = -1, top_student_ = 0, top_teacher_ = 0, peak_tile_ = 0;
  alignas(64) F slope_[kTile<X> + Fmt::step];
  alignas(64) X out_[kTile<X> + Fmt::step];
};

// ---------------------------------------------------------------------------------------------------------------------

inline bool native_bf16(const RowsCall& call) {
  return call.student.dtype == DType::bf16 && call.teacher.dtype == DType::bf16 && !transforms(call.student) &&
         !transforms(call.teacher) && (call.grad.data == nullptr || call.grad.dtype == DType::bf16);
}
inline void scale(const ScaleCall& call, int64_t row) {
  const double factor = call.factors[call.per_row ? row : 0];
  const bool in_place = call.out == call.data;
  if (in_place && factor == 1) return;
  const int64_t start = row / call.inner_rows * call.stride_outer + row % call.inner_rows * call.stride_inner;
  const char* data = (const char*)call.data + start * size_of(call.dtype);
  char* out = (char*)call.out + (in_place ? start : row * call.out_stride) * size_of(call.out_dtype);
  for (int64_t i = 0; i < call.columns; i += kShortestTile) {
    const int64_t n = call.columns - i < kShortestTile ? call.columns - i : kShortestTile;
    const char* from = data + i * size_of(call.dtype);
    char* to = out + i * size_of(call.out_dtype);
    alignas(64) double wide[kShortestTile];
    float* narrow = (float*)wide;
    if (call.dtype == DType::f64) {
      read(call.dtype, from, wide, n);
      for (int64_t j = 0; j < n; ++j) wide[j] *= factor;
      write(call.out_dtype, wide, to, n);
    } else {
      read(call.dtype, from, narrow, n);
      for (int64_t j = 0; j < n; ++j) narrow[j] *= (float)factor;
      write(call.out_dtype, narrow, to, n);
    }
  }
}

inline int find(const char* name) {
  for (int i = 0; i < kDivergences; ++i)
    if (strcmp(kListed[i].name, name) == 0) return i;
  return -1;
}
inline bool keeps(int divergence) { return kListed[divergence].kl == nullptr; }

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
