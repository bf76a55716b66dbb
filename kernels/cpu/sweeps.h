// One tile of one row: the vector loops. Each is a struct with a static `run`, so that tables of them can be built.
#pragma once

#include "formats.h"
#include "pointwise.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

// What a row needs of the teacher: nothing, the gap weighted by p, by q or by both (the KLs), or, for divergences given
// entry by entry, only its normaliser before and its gradients (kept from the middle sweep) after.
enum Kind { kNone = 0, kForward = 1, kReverse = 2, kBoth = 3, kEntrywise = 4 };

// The exponentials of one side, scaled such that the largest so far is near 1: 2^(x scale - whole).
template <class F>
struct Reference {
  F scale = 0;  // log2(e) / temperature, rounded: the row is computed consistently at that temperature
  F max = 0;
  F shift = 1;  // 2^(max scale - whole)
  double whole = 0;
  bool seen = false;

  double inverse_temperature() const { return scale * kLn2; }

  // Takes up the maximum of one more tile and returns what sums made so far must be multiplied with (exact).
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
  // Whether a tile whose smallest entry is `lo` can do without cuts, see NearPower. Without fused multiply-add only
  // differences to the maximum are precise enough.
  bool near([[maybe_unused]] F lo) const {
#ifdef FUSEDKD_NO_FMA
    return false;
#else
    double bottom = (double)lo * scale, top = (double)max * scale;
    return bottom - whole > -100 && bottom > -100000 && bottom < 100000 && top > -100000 && top < 100000;
#endif
  }
  double log_sum(double sum) const { return seen ? whole * kLn2 + ::log(sum) : __builtin_nan(""); }
};

template <class V, bool kFar>
struct Power : NearPower<V> {
  template <class F>
  FUSEDKD_INLINE explicit Power(const Reference<F>& r) : NearPower<V>(r.scale, r.whole) {}
};
template <class V>
struct Power<V, true> {
  V scale, max, shift;
  template <class F>
  FUSEDKD_INLINE explicit Power(const Reference<F>& r)
      : scale(splat<V>(r.scale)), max(splat<V>(r.max)), shift(splat<V>(r.shift)) {}
  FUSEDKD_INLINE V operator()(V x) const { return exp2(x - max, scale) * shift; }
};

// Logits as the sweeps read them: bf16 as it lies in memory, or fp32 or fp64. Entries of bf16 come out evens first, two
// instructions for 32 of them; every sweep does the same, and the gradient goes back the same way.
template <class V>
struct Pair {
  V a, b;
};
template <class X>
struct Format {
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
template <>
struct Format<uint16_t> {
  typedef float F;
  typedef VF V;
  static constexpr int64_t lanes = sizeof(V) / sizeof(F), step = 2 * lanes;
  FUSEDKD_INLINE static Pair<V> get(const uint16_t* p) {
    VI both = load<VI>(p);
    return {(VF)(both << 16), (VF)(both & (int32_t)0xffff0000)};
  }
  FUSEDKD_INLINE static VI round(VF x) { return bits(x) + 0x7fff + ((bits(x) >> 16) & 1); }  // no NaN comes here
  FUSEDKD_INLINE static void put(uint16_t* p, Pair<V> g, bool stream) {
    VI both = ((round(g.a) >> 16) & 0xffff) | (round(g.b) & (int32_t)0xffff0000);
    if (stream) return stream_store(p, both);
    store(p, both);
  }
  static int64_t slot(int64_t i) { return i - i % step + i % 2 * lanes + i % step / 2; }
};

template <class X>
struct Tile {
  typedef typename Format<X>::F F;
  const X *student, *teacher;
  X* grad;
  F* kept;    // gradients of an entrywise divergence, between the middle sweep and the last
  int64_t n;  // a multiple of Format<X>::step
  int64_t ahead;  // the next tile is this many entries on: fetched from memory while this one computes
  bool stream;
};

template <class F>
struct Row {
  Reference<F> student, teacher, unit;  // unit: the student at T = 1
  F ratio;                              // of inverse temperatures, teacher to student
};

template <class F>
struct Sums {
  double student = 0, teacher = 0, unit = 0;  // of exponentials
  double forward = 0, reverse = 0;            // of gaps, in units of kGapUnit times the student's temperature
  double teacher_absent = 0, student_absent = 0;  // exponentials where the gap is infinite
  F only_teacher = -kInfinity, only_student = -kInfinity;  // largest logit where the other side is -inf
};

// Sums of gaps are scaled by 2^-8: finite masks such as the type's lowest number must not overflow them.
constexpr double kGapUnit = 256;

// A sum in two stages: rounding grows with the number of terms in a stage, and a row has 150,000.
template <class V>
struct Sum {
  V recent = {}, folded = {};
  FUSEDKD_INLINE void operator+=(V x) { recent += x; }
  FUSEDKD_INLINE void add_product(V x, V y) { recent = fma(x, y, recent); }
  FUSEDKD_INLINE void fold() { folded += recent, recent = V{}; }
  FUSEDKD_INLINE double value() const { return total(folded); }
};
constexpr int64_t kFold = 8;  // steps

template <class X, Kind kKind, bool kUnit, bool kFar>
struct Statistics {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;
  Power<V, kFar> power_s, power_t, power_u;
  V ratio;
  Sum<V> zs, zt, zu, forward, reverse, teacher_absent, student_absent;
  V only_teacher = splat<V>(-kInfinity), only_student = splat<V>(-kInfinity);

  FUSEDKD_INLINE explicit Statistics(const Row<F>& row)
      : power_s(row.student), power_t(row.teacher), power_u(row.unit),
        ratio(splat<V>(kFar ? row.ratio / (F)kGapUnit : row.ratio)) {}

  FUSEDKD_INLINE void add(V s, V t) {
    V es = power_s(s);
    zs += es;
    if (kUnit) zu += power_u(s);
    if (kKind == kNone) return;
    V et = power_t(t);
    zt += et;
    if (kKind == kEntrywise) return;
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
    zs.fold(), zt.fold(), zu.fold(), forward.fold(), reverse.fold(), teacher_absent.fold(), student_absent.fold();
  }

  static void run(const Tile<X>& tile, const Row<F>& row, Sums<F>& sums) {
    constexpr bool teacher = kKind != kNone, gaps = teacher && kKind != kEntrywise;
    Statistics self(row);
    for (int64_t i = 0; i < tile.n;) {
      const int64_t end = i + kFold * Fmt::step < tile.n ? i + kFold * Fmt::step : tile.n;
      for (; i < end; i += Fmt::step) {
        for (int64_t line = 0; line < Fmt::step; line += 64 / (int64_t)sizeof(X)) {
          __builtin_prefetch(tile.student + tile.ahead + i + line);
          if (teacher) __builtin_prefetch(tile.teacher + tile.ahead + i + line);
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

// ---------------------------------------------------------------------------------------------------------------------

// A constant in two parts. What would be one rounding at random in a single entry is the same error in every entry of the
// row, and does not average out.
template <class F>
struct Exact {
  F high = 0, low = 0;
  Exact() {}
  explicit Exact(double x) : high((F)x), low((F)(x - (double)high)) {}
};
template <class V, class F>
FUSEDKD_INLINE V times(V x, Exact<F> c) {
  return fma(x, splat<V>(c.high), x * splat<V>(c.low));
}
template <class V, class F>
FUSEDKD_INLINE V fma(V x, V y, Exact<F> c) {
  return fma(x, y, splat<V>(c.high)) + splat<V>(c.low);
}

template <class F>
struct Middle {
  Exact<F> over_student, over_teacher;  // 1 / sums of exponentials
  Exact<F> log_student, log_teacher;    // minus their logarithms
  Exact<F> far_student, far_teacher;    // log-probability of the largest entry
  F student_rate, teacher_rate;  // inverse temperatures
  Exact<F> gap, far_gap;         // what the normalisers add to a gap
  const double* parameters;
  double value = 0, grad = 0;    // the sums that come out
};

template <class D, class X, bool kFar>
struct Entrywise {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;

  FUSEDKD_INLINE static Point<V> at(V s, V t, const Row<F>& row, const Middle<F>& m) {
    const V ln2 = splat<V>(kLn2), ratio = splat<V>(row.ratio), rate = splat<V>(m.student_rate);
    Entry<V> e;
    e.p = times(Power<V, kFar>(row.teacher)(t), m.over_teacher);
    e.q = times(Power<V, kFar>(row.student)(s), m.over_student);
    if (kFar) {
      V dt = t - splat<V>(row.teacher.max), ds = s - splat<V>(row.student.max);
      e.lp = fma(dt, splat<V>(m.teacher_rate), m.far_teacher);
      e.lq = fma(ds, rate, m.far_student);
      auto neither = (e.lp == splat<V>(-kInfinity)) & (e.lq == splat<V>(-kInfinity));
      V gap = fma(fma(dt, ratio, -ds), rate, m.far_gap);
      e.gap = neither ? V{} : gap;
      e.ratio = exp(-abs(e.gap));
    } else {
      V pt = fma(t, splat<V>(row.teacher.scale), splat<V>(-row.teacher.whole));
      V ps = fma(s, splat<V>(row.student.scale), splat<V>(-row.student.whole));
      e.lp = fma(pt, ln2, m.log_teacher);
      e.lq = fma(ps, ln2, m.log_student);
      e.gap = fma(fma(t, ratio, -s), rate, m.gap);
      e.ratio = NearPower<V>(kLog2E, 0)(-abs(e.gap));  // near tiles: 2^-100 / V at least
    }
    return D::at(e, m.parameters);
  }

  static void run(const Tile<X>& tile, const Row<F>& row, Middle<F>& m) {
    Sum<V> value, grad;
    double parameters[kParameters];  // a copy that nothing in the loop can be suspected of changing
    memcpy(parameters, m.parameters, sizeof parameters);
    Middle<F> local = m;
    local.parameters = parameters;
    const Row<F> fixed = row;
    for (int64_t i = 0; i < tile.n; i += Fmt::step) {
      Pair<V> s = Fmt::get(tile.student + i), t = Fmt::get(tile.teacher + i);
      Point<V> a = at(s.a, t.a, fixed, local), b = at(s.b, t.b, fixed, local);
      value += a.value;
      value += b.value;
      if (i % (kFold * Fmt::step) == 0) value.fold(), grad.fold();
      if (tile.kept == nullptr) continue;
      grad += a.grad;
      grad += b.grad;
      store(tile.kept + i, a.grad);
      store(tile.kept + i + Fmt::lanes, b.grad);
    }
    value.fold(), grad.fold();
    m.value += value.value();
    m.grad += grad.value();
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class F>
struct Coefficients {
  F constant;            // label smoothing
  F student, teacher;    // of the exponentials; teacher also of the kept gradients
  F student_far;         // in place of `student` where gaps start from the largest entries
  F student_absent;      // in place of `student` where the teacher is -inf
  F gap;                 // of exponential times gap
  F unit;                // of the exponential at T = 1
};

template <class X, Kind kKind, bool kUnit, bool kFar>
struct Gradient {
  typedef Format<X> Fmt;
  typedef typename Fmt::F F;
  typedef typename Fmt::V V;
  Power<V, kFar> power_s, power_t, power_u;
  V ratio, constant, student, teacher, student_far, student_absent, gap_factor, unit;

  FUSEDKD_INLINE Gradient(const Row<F>& row, const Coefficients<F>& c)
      : power_s(row.student), power_t(row.teacher), power_u(row.unit),
        ratio(splat<V>(kFar ? row.ratio / (F)kGapUnit : row.ratio)), constant(splat<V>(c.constant)),
        student(splat<V>(c.student)), teacher(splat<V>(c.teacher)), student_far(splat<V>(c.student_far)),
        student_absent(splat<V>(c.student_absent)), gap_factor(splat<V>(kFar ? c.gap * (F)kGapUnit : c.gap)), unit(splat<V>(c.unit)) {}

  FUSEDKD_INLINE V at(V s, V t, V kept) const {
    V g = constant, factor = student;
    if (kUnit) g = fma(power_u(s), unit, g);
    if (kKind == kEntrywise) g = fma(kept, teacher, g);
    if (kKind == kForward || kKind == kBoth) g = fma(power_t(t), teacher, g);
    if (kKind == kReverse || kKind == kBoth) {
      if constexpr (kFar) {  // finite, for its exponential may be 0
        const V most = splat<V>(Of<V>::largest);
        V gap = fma(t - power_t.max, ratio, (power_s.max - s) * splat<V>(1 / kGapUnit));
        factor = finite(gap) ? max(-most, min(most, fma(gap, gap_factor, student_far))) : student_absent;
      } else {
        factor = fma(fma(t, ratio, -s), gap_factor, student);
      }
    }
    g = fma(power_s(s), factor, g);
    return kFar ? (s == splat<V>(-kInfinity) ? V{} : g) : g;
  }

  static void run(const Tile<X>& tile, const Row<F>& row, const Coefficients<F>& c) {
    const Gradient self(row, c);
    const bool stream = tile.stream;
    for (int64_t i = 0; i < tile.n; i += Fmt::step) {
      constexpr bool kept = kKind == kEntrywise, teacher = kKind != kNone && !kept;
      Pair<V> s = Fmt::get(tile.student + i), t = teacher ? Fmt::get(tile.teacher + i) : s;
      Pair<V> k = kept ? Pair<V>{load<V>(tile.kept + i), load<V>(tile.kept + i + Fmt::lanes)} : s;
      Fmt::put(tile.grad + i, {self.at(s.a, t.a, k.a), self.at(s.b, t.b, k.b)}, stream);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class X>
FUSEDKD_INLINE void extremes(const X* x, int64_t n, X* lo, X* hi) {
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
// bf16 in two instructions for 32 entries: as signed numbers the largest is the largest logit, unless all are negative;
// as unsigned ones the largest is the smallest logit, unless none is (then 0 is a bound below, which is all we need).
FUSEDKD_INLINE void extremes(const uint16_t* x, int64_t n, float* lo, float* hi) {
  typedef int16_t VS __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  const int16_t lowest = INT16_MIN;
  VS top = VS{} + lowest;
  VH bottom = {};
  for (int64_t i = 0; i < n; i += sizeof(VS) / 2) {
    VS v = load<VS>(x + i);
    top = v > top ? v : top;
    bottom = (VH)v > bottom ? (VH)v : bottom;
  }
  int16_t signed_top = lowest;
  uint16_t unsigned_top = 0;
  for (int64_t i = 0; i < (int64_t)sizeof(VS) / 2; ++i) {
    signed_top = top[i] > signed_top ? top[i] : signed_top;
    unsigned_top = bottom[i] > unsigned_top ? bottom[i] : unsigned_top;
  }
  *lo = unsigned_top & 0x8000 ? from_bf16(unsigned_top) : 0;
  *hi = from_bf16((uint16_t)signed_top);
  if (signed_top >= 0) return;
  uint16_t smallest = 0xffff;
  for (int64_t i = 0; i < n; ++i) smallest = x[i] < smallest ? x[i] : smallest;
  *hi = from_bf16(smallest);
}

// sum of e (x - max) on each side, and sum of (x - max) / V: what entropies and label smoothing need. Padding holds max.
template <class X>
void moments(const X* x, int64_t n, const Reference<typename Format<X>::F>& r, double share, double* weighted,
             double* plain) {
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
