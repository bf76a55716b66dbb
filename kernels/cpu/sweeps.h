// One tile of one row: the vector loops. Each is a struct with a static `run`, so that tables of
// them can be built.
#pragma once

#include "formats.h"
#include "pointwise.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// What a row needs of the teacher: nothing, the gap weighted by p, by q or by both (the KLs), or,
// for divergences given entry by entry, only its normaliser before and its gradients (kept from the
// middle sweep) after.
enum Kind { kNone = 0, kForward = 1, kReverse = 2, kBoth = 3, kEntrywise = 4 };

// The exponentials of one side, scaled such that the largest so far is near 1: 2^(x scale - whole).
template <class F> struct Reference {
  F scale =
      0;  // log2(e) / temperature, rounded: the row is computed consistently at that temperature
  F max = 0;
  F shift = 1;  // 2^(max scale - whole)
  double whole = 0;
  bool seen = false;

  double inverse_temperature() const { return scale * kLn2; }

  // Takes up the maximum of one more tile and returns what sums made so far must be multiplied with
  // (exact).
  double advance(F hi) {
    if (!(hi > (seen ? max : -(F)kInfinity)) && hi == hi) return 1;
    double old = whole, exponent = (double)hi * scale;
    bool usable = exponent - exponent == 0;
    whole = usable ? ::nearbyint(exponent) : 0;
    shift = usable ? (F)::exp2(exponent - whole) : 1;
    max = hi;
    bool first = !seen;
    seen = true;
    return first || old == whole ? 1 : ::exp2(old - whole);
  }
  // Whether a tile whose smallest entry is `lo` can do without cuts, see NearPower; `reach` is
  // minus the exponent of the smallest coefficient. Without fused multiply-add only differences to
  // the maximum are precise enough.
  bool near([[maybe_unused]] F lo, [[maybe_unused]] double reach) const {
#ifdef FUSEDKD_NO_FMA
    return false;
#else
    double bottom = (double)lo * scale, top = (double)max * scale;
    return bottom - whole > reach - 120 && bottom > -1000 && bottom < 1000 && top > -1000 &&
           top < 1000;
#endif
  }
  double log_sum(double sum) const { return seen ? whole * kLn2 + ::log(sum) : __builtin_nan(""); }
};

// A side's exponentials, times a coefficient.
template <class V, bool kFar, bool fine = false> struct Power : NearPower<V, fine> {
  template <class F>
  FUSEDKD_INLINE explicit Power(const Reference<F>& r, double coefficient = 1)
      : NearPower<V, fine>(r.scale, r.whole, coefficient) {}
};
template <class V, bool fine> struct Power<V, true, fine> {
  V scale, max, shift;
  Exact<typename Of<V>::F> coefficient;
  template <class F>
  FUSEDKD_INLINE explicit Power(const Reference<F>& r, double coefficient = 1)
      : scale(splat<V>(r.scale)), max(splat<V>(r.max)), shift(splat<V>(r.shift)),
        coefficient(coefficient) {}
  FUSEDKD_INLINE V operator()(V x) const {
    return times(exp2(x - max, scale) * shift, coefficient);
  }
  FUSEDKD_INLINE V plus(V x, V sum) const { return sum + (*this)(x); }
};

// Logits as the sweeps read them: bf16 as it lies in memory, or fp32 or fp64. Entries of bf16 come
// out evens first, two instructions for 32 of them; every sweep does the same, and the gradient
// goes back the same way.
template <class V> struct Pair {
  V a, b;
};
template <class X> struct Format {
  typedef X F;
  typedef typename Lanes<F>::V V;
  static constexpr int64_t lanes = sizeof(V) / sizeof(F), step = 2 * lanes;
  FUSEDKD_INLINE static Pair<V> get(const X* p) { return {load<V>(p), load<V>(p + lanes)}; }
  FUSEDKD_INLINE static void put(X* p, Pair<V> g, bool stream) {
    if (stream) return stream_store(p, bits(g.a)), stream_store(p + lanes, bits(g.b));
    store(p, g.a);
    store(p + lanes, g.b);
  }
  static int64_t slot(int64_t i) { return i; }  // where entry i of a tile stands in this order
};
template <> struct Format<uint16_t> {
  typedef float F;
  typedef VF V;
  static constexpr int64_t lanes = sizeof(V) / sizeof(F), step = 2 * lanes;
  FUSEDKD_INLINE static Pair<V> get(const uint16_t* p) {
    const auto both = load<Lanes<float>::U>(p);
    return {(VF)(both << 16), (VF)(both & 0xffff0000u)};
  }
  FUSEDKD_INLINE static VI round(VF x) {
    return (VI)(bits(x) + 0x8000u);
  }  // to nearest, ties away from 0; no NaN comes here
  FUSEDKD_INLINE static void put(uint16_t* p, Pair<V> g, bool stream) {
    VI both = odd_halves(shift_right(round(g.a), 16), round(g.b));
    if (stream) return stream_store(p, both);
    store(p, both);
  }
  static int64_t slot(int64_t i) { return i - i % step + i % 2 * lanes + i % step / 2; }
};

template <class X> constexpr int64_t kTile = kTileBytes / (int64_t)sizeof(X);

template <class X> struct Tile {
  typedef typename Format<X>::F F;
  const X *student, *teacher;
  X* grad;
  F* kept;    // gradients of an entrywise divergence, between the middle sweep and the last
  int64_t n;  // a multiple of Format<X>::step
  int64_t
      ahead;  // the next tile is this many entries on: fetched from memory while this one computes
  // The same tile of the next row (or of this one, where there is none), on its way to L2: the
  // student's in the first sweep, the teacher's in the last, for neither has time for both (28.2
  // ms; both in the last 31.0, none 32.2; 512 x 151,936 in bf16 on 2 cores of Granite Rapids,
  // 2026-11-26; AVX2 gains nothing).
  const X *next_student, *next_teacher;
  bool stream;
};

template <class F> struct Row {
  Reference<F> student, teacher, unit;  // unit: the student at T = 1
  F ratio;                              // of inverse temperatures, teacher to student
};

template <class F> struct Sums {
  double student = 0, teacher = 0, unit = 0;  // of exponentials
  double forward = 0, reverse = 0;  // of gaps, in units of kGapUnit times the student's temperature
  double teacher_absent = 0, student_absent = 0;  // exponentials where the gap is infinite
  F only_teacher = -kInfinity,
    only_student = -kInfinity;  // largest logit where the other side is -inf
};

// Sums of gaps are scaled by 2^-8: finite masks such as the type's lowest number must not overflow
// them.
constexpr double kGapUnit = 256;

// A sum in two stages: rounding grows with the number of terms in a stage, and a row has 150,000.
template <class V> struct Sum {
  V recent = {}, folded = {};
  FUSEDKD_INLINE void operator+=(V x) { recent += x; }
  FUSEDKD_INLINE void add_product(V x, V y) { recent = fma(x, y, recent); }
  template <class P> FUSEDKD_INLINE void add_power(const P& power, V x) {
    recent = power.plus(x, recent);
  }
  FUSEDKD_INLINE void fold() { folded += recent, recent = V{}; }
  FUSEDKD_INLINE double value() const { return total(folded); }
};
constexpr int64_t kFold = 8;  // steps

template <class X, Kind kKind, bool kUnit, bool kFar> struct StatisticsSweep {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;
  Power<V, kFar> power_s, power_t, power_u;
  V ratio;
  Sum<V> zs, zt, zu, forward, reverse, teacher_absent, student_absent;
  V only_teacher = splat<V>(-kInfinity), only_student = splat<V>(-kInfinity);

  FUSEDKD_INLINE explicit StatisticsSweep(const Row<F>& row)
      : power_s(row.student), power_t(row.teacher), power_u(row.unit),
        ratio(splat<V>(kFar ? row.ratio / (F)kGapUnit : row.ratio)) {}

  FUSEDKD_INLINE void add(V s, V t) {
    if (kUnit) zu.add_power(power_u, s);
    V es{};
    if (kFar || kKind & kReverse) zs += es = power_s(s);
    else zs.add_power(power_s, s);
    if (kKind == kNone) return;
    if (kKind == kEntrywise) return zt.add_power(power_t, t);
    V et = power_t(t);
    zt += et;
    V gap;
    if constexpr (kFar) {
      // from the largest entries, so that what all logits have in common costs no digits
      gap = fma(t - power_t.max, ratio, (power_s.max - s) * splat<V>(1 / kGapUnit));
      const V zero = {}, infinity = splat<V>(kInfinity);
      auto present = finite(gap);
      teacher_absent += present ? zero : et;
      student_absent += present ? zero : es;
      only_teacher = max(only_teacher, gap == infinity ? t : -infinity);
      only_student = max(only_student, gap == -infinity ? s : -infinity);
      gap = present ? gap : zero;
    } else {
      gap = fma(t, ratio, -s);
    }
    if (kKind & kForward) forward.add_product(et, gap);
    if (kKind & kReverse) reverse.add_product(es, gap);
  }
  FUSEDKD_INLINE void fold() {
    zs.fold(), zt.fold(), zu.fold(), forward.fold(), reverse.fold(), teacher_absent.fold(),
        student_absent.fold();
  }

  static void run(const Tile<X>& tile, const Row<F>& row, Sums<F>& sums) {
    constexpr bool teacher = kKind != kNone, gaps = teacher && kKind != kEntrywise;
    StatisticsSweep self(row);
    for (int64_t i = 0; i < tile.n;) {
      const int64_t end = i + kFold * Fmt::step < tile.n ? i + kFold * Fmt::step : tile.n;
      for (; i < end; i += Fmt::step) {
        for (int64_t line = 0; line < Fmt::step; line += 64 / (int64_t)sizeof(X)) {
          __builtin_prefetch(tile.student + tile.ahead + i + line);
          if (teacher) __builtin_prefetch(tile.teacher + tile.ahead + i + line);
          __builtin_prefetch(tile.next_student + i + line, 0, 2);
        }
        Pair<V> s = Fmt::get(tile.student + i), t = teacher ? Fmt::get(tile.teacher + i) : s;
        self.add(s.a, t.a);
        self.add(s.b, t.b);
      }
      self.fold();
    }
    const double zs = self.zs.value(), zt = self.zt.value();
    sums.student += zs, sums.teacher += zt, sums.unit += self.zu.value();
    if (!gaps) return;
    double absent_t = 0, absent_s = 0, unit = 1 / kGapUnit, common = 0;
    if (kFar) {
      absent_t = self.teacher_absent.value(), absent_s = self.student_absent.value();
      unit = 1, common = (row.teacher.max / kGapUnit) * row.ratio - row.student.max / kGapUnit;
      F only_t = largest(self.only_teacher), only_s = largest(self.only_student);
      sums.only_teacher = only_t > sums.only_teacher ? only_t : sums.only_teacher;
      sums.only_student = only_s > sums.only_student ? only_s : sums.only_student;
    }
    sums.teacher_absent += absent_t, sums.student_absent += absent_s;
    if (kKind & kForward) sums.forward += unit * self.forward.value() + common * (zt - absent_t);
    if (kKind & kReverse) sums.reverse += unit * self.reverse.value() + common * (zs - absent_s);
  }
};

// -------------------------------------------------------------------------------------------------

template <class F> struct Middle {
  double over_student, over_teacher;  // 1 / sums of exponentials
  Exact<F> log_student, log_teacher;  // minus their logarithms
  Exact<F> far_student, far_teacher;  // log-probability of the largest entry
  F student_rate, teacher_rate;       // inverse temperatures
  Exact<F> gap, far_gap;              // what the normalisers add to a gap
  const double* parameters;
  bool apart = false;          // see Entry
  double value = 0, grad = 0;  // the sums that come out
};

template <class D, class X, bool kFar> struct Entrywise {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;
  Power<V, kFar, true> power_p, power_q;
  NearPower<V, true> power_ratio;
  V ratio, rate_t, rate_s, scale_t, scale_s, whole_t, whole_s, max_t, max_s;
  Exact<F> log_t, log_s, gap;
  double parameters[kParameters];  // a copy that nothing in the loop can be suspected of changing
  bool apart;

  FUSEDKD_INLINE Entrywise(const Row<F>& row, const Middle<F>& m)
      : power_p(row.teacher, m.over_teacher), power_q(row.student, m.over_student),
        power_ratio(kLog2E, 0, 1), ratio(splat<V>(row.ratio)), rate_t(splat<V>(m.teacher_rate)),
        rate_s(splat<V>(m.student_rate)), scale_t(splat<V>(row.teacher.scale)),
        scale_s(splat<V>(row.student.scale)), whole_t(splat<V>(-row.teacher.whole)),
        whole_s(splat<V>(-row.student.whole)), max_t(splat<V>(row.teacher.max)),
        max_s(splat<V>(row.student.max)), log_t(kFar ? m.far_teacher : m.log_teacher),
        log_s(kFar ? m.far_student : m.log_student), gap(kFar ? m.far_gap : m.gap), apart(m.apart) {
    memcpy(parameters, m.parameters, sizeof parameters);
  }

  // The exponentials of one entry. They come first for a whole block: one after the other,
  // exponentials and what is made of them are too long a chain for the processor to find the next
  // one's instructions to fill the gaps with.
  FUSEDKD_INLINE void begin(V s, V t, F* p, F* q, F* smaller_over_larger) const {
    store(p, power_p(t));
    store(q, power_q(s));
    const V gap = minus_abs(gap_of(s, t));
    if constexpr (kFar) {
      store(smaller_over_larger, exp(gap));
    } else {
      store(smaller_over_larger, power_ratio(gap));  // near tiles: 2^-100 / V at least
    }
  }
  FUSEDKD_INLINE V gap_of(V s, V t) const {
    if constexpr (kFar) {
      V dt = t - max_t, ds = s - max_s, gaps = fma(fma(dt, ratio, -ds), rate_s, gap);
      auto neither = (dt == splat<V>(-kInfinity)) & (ds == splat<V>(-kInfinity));
      return neither ? V{} : gaps;
    } else {
      return fma(fma(t, ratio, -s), rate_s, gap);
    }
  }
  FUSEDKD_INLINE Point<V> end(V s, V t, const F* p, const F* q,
                              const F* smaller_over_larger) const {
    Entry<V> e;
    e.apart = sizeof(F) == sizeof(double) && apart;
    e.p = load<V>(p), e.q = load<V>(q), e.ratio = load<V>(smaller_over_larger),
    e.gap = gap_of(s, t);
    if constexpr (kFar) {
      e.lp = fma(t - max_t, rate_t, log_t);
      e.lq = fma(s - max_s, rate_s, log_s);
    } else {
      const V ln2 = splat<V>(kLn2);
      e.lp = fma(fma(t, scale_t, whole_t), ln2, log_t);
      e.lq = fma(fma(s, scale_s, whole_s), ln2, log_s);
    }
    return D::at(e, parameters);
  }

  static void run(const Tile<X>& tile, const Row<F>& row, Middle<F>& m) {
    constexpr int64_t kBlock = kFold * Fmt::step;
    const Entrywise self(row, m);
    Sum<V> value, grad;
    alignas(64) F p[kBlock], q[kBlock], ratio[kBlock];
    for (int64_t from = 0; from < tile.n; from += kBlock) {
      const int64_t n = tile.n - from < kBlock ? tile.n - from : kBlock;
      const X *student = tile.student + from, *teacher = tile.teacher + from;
      F* kept = tile.kept ? tile.kept + from : nullptr;
      for (int64_t i = 0, j = Fmt::lanes; i < n; i += Fmt::step, j += Fmt::step) {
        Pair<V> s = Fmt::get(student + i), t = Fmt::get(teacher + i);
        self.begin(s.a, t.a, p + i, q + i, ratio + i);
        self.begin(s.b, t.b, p + j, q + j, ratio + j);
      }
      for (int64_t i = 0, j = Fmt::lanes; i < n; i += Fmt::step, j += Fmt::step) {
        Pair<V> s = Fmt::get(student + i), t = Fmt::get(teacher + i);
        Point<V> a = self.end(s.a, t.a, p + i, q + i, ratio + i),
                 b = self.end(s.b, t.b, p + j, q + j, ratio + j);
        value += a.value;
        value += b.value;
        if (kept == nullptr) continue;
        grad += a.grad;
        grad += b.grad;
        store(kept + i, a.grad);
        store(kept + j, b.grad);
      }
      value.fold(), grad.fold();
    }
    m.value += value.value();
    m.grad += grad.value();
  }
};

// -------------------------------------------------------------------------------------------------

struct Coefficients {
  double constant;          // label smoothing
  double student, teacher;  // of the exponentials; teacher also of the kept gradients
  double student_far;       // in place of `student` where gaps start from the largest entries
  double student_absent;    // in place of `student` where the teacher is -inf
  double gap;               // of exponential times gap
  double unit;              // of the exponential at T = 1

  // How far from 1 those of exponentials are, in powers of two: what Reference::near must keep
  // clear of.
  double reach(Kind kind, bool separate) const {
    double most = 0;
    if (kind == kNone || kind == kForward || kind == kEntrywise) most = from_one(student);
    if (kind == kForward || kind == kBoth) most = ::fmax(most, from_one(teacher));
    return separate ? ::fmax(most, from_one(unit)) : most;
  }

 private:
  static double from_one(double c) { return ::fabs(::log2(::fabs(c))); }  // of 0: infinite
};

template <class X, Kind kKind, bool kUnit, bool kFar> struct GradientSweep {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;
  static constexpr bool reverse = kKind == kReverse || kKind == kBoth,
                        forward = kKind == kForward || kKind == kBoth;
  Power<V, kFar> power_s, power_t, power_u;
  V ratio, constant, kept_factor, student, student_far, student_absent, gap_factor;

  FUSEDKD_INLINE GradientSweep(const Row<F>& row, const Coefficients& c)
      : power_s(row.student, reverse ? 1 : c.student), power_t(row.teacher, c.teacher),
        power_u(row.unit, c.unit), ratio(splat<V>(kFar ? row.ratio / (F)kGapUnit : row.ratio)),
        constant(splat<V>(c.constant)), kept_factor(splat<V>(c.teacher)),
        student(splat<V>(c.student)), student_far(splat<V>(c.student_far)),
        student_absent(splat<V>(c.student_absent)),
        gap_factor(splat<V>(kFar ? c.gap * kGapUnit : c.gap)) {}

  FUSEDKD_INLINE V at(V s, V t, V kept) const {
    V g = constant;
    if (kUnit) g = power_u.plus(s, g);
    if (kKind == kEntrywise) g = fma(kept, kept_factor, g);
    if (forward) g = power_t.plus(t, g);
    if constexpr (!reverse) {
      g = power_s.plus(s, g);
    } else if constexpr (kFar) {  // finite, for its exponential may be 0
      const V most = splat<V>(Of<V>::largest);
      V gap = fma(t - power_t.max, ratio, (power_s.max - s) * splat<V>(1 / kGapUnit));
      V factor =
          finite(gap) ? max(-most, min(most, fma(gap, gap_factor, student_far))) : student_absent;
      g = fma(power_s(s), factor, g);
    } else {
      g = fma(power_s(s), fma(fma(t, ratio, -s), gap_factor, student), g);
    }
    return kFar ? (s == splat<V>(-kInfinity) ? V{} : g) : g;
  }

  static void run(const Tile<X>& tile, const Row<F>& row, const Coefficients& c) {
    const GradientSweep self(row, c);
    const bool stream = tile.stream;
    for (int64_t i = 0; i < tile.n; i += Fmt::step) {
      constexpr bool kept = kKind == kEntrywise, teacher = kKind != kNone && !kept;
      for (int64_t line = 0; line < Fmt::step; line += 64 / (int64_t)sizeof(X)) {
        __builtin_prefetch(tile.next_teacher + i + line, 0, 2);
      }
      Pair<V> s = Fmt::get(tile.student + i), t = teacher ? Fmt::get(tile.teacher + i) : s;
      Pair<V> k = kept ? Pair<V>{load<V>(tile.kept + i), load<V>(tile.kept + i + Fmt::lanes)} : s;
      Fmt::put(tile.grad + i, {self.at(s.a, t.a, k.a), self.at(s.b, t.b, k.b)}, stream);
    }
  }
};

// -------------------------------------------------------------------------------------------------

template <class X> FUSEDKD_INLINE void extremes(const X* x, int64_t n, X* lo, X* hi) {
  typedef typename Lanes<X>::V V;
  V least = splat<V>(kInfinity), most = splat<V>(-kInfinity);
  for (int64_t i = 0; i < n; i += sizeof(V) / sizeof(X)) {
    V v = load<V>(x + i);
    least = min(v, least);
    most = max(v, most);
  }
  *hi = largest(most);
  *lo = -largest(-least);
}
// bf16 in two instructions for 32 entries: as signed numbers the largest is the largest logit,
// unless all are negative; as unsigned ones the largest is the smallest logit, unless none is (then
// 0 is a bound below, which is all we need).
FUSEDKD_INLINE void extremes(const uint16_t* x, int64_t n, float* lo, float* hi) {
  typedef int16_t VS __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  const int16_t lowest = INT16_MIN;
  constexpr int64_t lanes = sizeof(VS) / 2, step = 4 * lanes;
  VS top[4], bottom[4];  // the latter of unsigned numbers
  for (int j = 0; j < 4; ++j) top[j] = VS{} + lowest, bottom[j] = VS{};
  auto see = [&](int j, VS v) __attribute__((always_inline)) {
    top[j] = v > top[j] ? v : top[j];
    bottom[j] = (VS)((VH)v > (VH)bottom[j] ? (VH)v : (VH)bottom[j]);
  };
  int64_t i = 0;
  for (; i + step <= n; i += step)
    for (int j = 0; j < 4; ++j) see(j, load<VS>(x + i + j * lanes));
  for (; i < n; i += lanes) see(0, load<VS>(x + i));
  int16_t signed_top = lowest;
  uint16_t unsigned_top = 0;
  for (int j = 1; j < 4; ++j) {
    top[0] = top[j] > top[0] ? top[j] : top[0];
    bottom[0] = (VS)((VH)bottom[j] > (VH)bottom[0] ? (VH)bottom[j] : (VH)bottom[0]);
  }
  int16_t tops[lanes];
  uint16_t bottoms[lanes];
  store(tops, top[0]), store(bottoms, bottom[0]);
  for (int j = 0; j < lanes; ++j) signed_top = tops[j] > signed_top ? tops[j] : signed_top;
  for (int j = 0; j < lanes; ++j)
    unsigned_top = bottoms[j] > unsigned_top ? bottoms[j] : unsigned_top;
  *lo = unsigned_top & 0x8000 ? from_bf16(unsigned_top) : 0;
  *hi = from_bf16((uint16_t)signed_top);
  if (signed_top >= 0) return;
  uint16_t smallest = 0xffff;
  for (int64_t i = 0; i < n; ++i) smallest = x[i] < smallest ? x[i] : smallest;
  *hi = from_bf16(smallest);
}

// sum of e (x - max) on each side, and sum of (x - max) / V: what entropies and label smoothing
// need. Padding holds max.
template <class X>
void moments(const X* x, int64_t n, const Reference<typename Format<X>::F>& r, double share,
             double* weighted, double* plain) {
  typedef typename Format<X>::V V;
  const Power<V, true> power(r);
  V sum = {}, mean = {};
  for (int64_t i = 0; i < n; i += Format<X>::step) {
    Pair<V> v = Format<X>::get(x + i);
    V da = v.a - splat<V>(r.max), db = v.b - splat<V>(r.max);
    sum += mul0(power(v.a), da) + mul0(power(v.b), db);
    mean = fma(da, splat<V>(share), fma(db, splat<V>(share), mean));
  }
  *weighted += total(sum);
  *plain += total(mean);
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
