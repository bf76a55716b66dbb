// Vectors of one instruction set and the functions that divergences are made of. Included by each
// isa_<isa>.cpp after it has switched its instruction set on, so everything here lives in a
// namespace of its own and uses no C++ library.
//
// GCC's vector extensions (clang has them too) carry the arithmetic; intrinsics appear where they
// pay.
#pragma once

namespace fusedkd {
namespace FUSEDKD_ISA {

#define FUSEDKD_INLINE inline __attribute__((always_inline))

template <class F> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
};
typedef Lanes<float>::V VF;
typedef Lanes<float>::I VI;
typedef Lanes<double>::V VD;
typedef Lanes<double>::I VL;
typedef uint16_t VH __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));

template <class V> struct Of;  // lane type F, integers I and U as wide, and numbers of the format
template <> struct Of<VF> {
  typedef float F;
  typedef VI I;
  typedef Lanes<float>::U U;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr F lowest_exponent = -127, highest_exponent = 128;
  static constexpr F largest = 3.402823466e38f, smallest = 1.17549435e-38f;
};
template <> struct Of<VD> {
  typedef double F;
  typedef VL I;
  typedef Lanes<double>::U U;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr F lowest_exponent = -1023, highest_exponent = 1024;
  static constexpr F largest = 1.7976931348623157e308, smallest = 2.2250738585072014e-308;
};

constexpr double kInfinity = __builtin_inf();
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class V> FUSEDKD_INLINE V splat(typename Of<V>::F x) { return V{} + x; }
template <class V, class T> FUSEDKD_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FUSEDKD_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// Past the caches, to memory that is not read again soon; p is aligned to a vector. With AVX2 it
// gains nothing (32.5 ms against 31.7, 128 x 151,936 in bf16, 2 cores of Zen 3, 2026-11-24).
template <class T, class V> FUSEDKD_INLINE void stream_store(T* p, V v) {
#if defined(FUSEDKD_AVX512)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#else
  store(p, v);
#endif
}
// As unsigned integers, whose sums and shifts may leave their range: signed ones must not.
template <class V> FUSEDKD_INLINE typename Of<V>::U bits(V v) { return (typename Of<V>::U)v; }
template <class V> FUSEDKD_INLINE typename Of<V>::U every(int64_t x) {
  return typename Of<V>::U{} + (decltype(typename Of<V>::U{}[0] + 0))x;
}
FUSEDKD_INLINE VI shift_right(VI x, int by) {
  return (VI)((Lanes<float>::U)x >> by);
}  // zeros come in from the left
// Of each pair of 16-bit numbers the first of `even` and the second of `odd`.
FUSEDKD_INLINE VI odd_halves(VI even, VI odd) {
#if defined(FUSEDKD_AVX512)
  return (VI)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, (__m512i)odd);
#elif defined(FUSEDKD_AVX2)
  return (VI)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return (even & 0xffff) | (odd & (int32_t)0xffff0000);
#endif
}

// a b + c with one rounding, except on the base set of x86, which has no such instruction
// (contraction is off).
#if defined(FUSEDKD_AVX512)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) {
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) {
  return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(FUSEDKD_AVX2)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) {
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) {
  return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) {
  return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) {
  return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
#define FUSEDKD_NO_FMA
template <class V> FUSEDKD_INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif

// Of two operands one of which is NaN, the second: so max(bound, x) keeps a NaN x.
#if defined(FUSEDKD_AVX512)
FUSEDKD_INLINE VF max(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
FUSEDKD_INLINE VF min(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(FUSEDKD_AVX2)
FUSEDKD_INLINE VF max(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
FUSEDKD_INLINE VF min(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
template <class V> FUSEDKD_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class V> FUSEDKD_INLINE V min(V a, V b) { return a < b ? a : b; }
template <class V> FUSEDKD_INLINE typename Of<V>::U sign_bit() {
  return every<V>(1) << (8 * (int)sizeof(typename Of<V>::F) - 1);
}
template <class V> FUSEDKD_INLINE V minus_abs(V a) { return (V)(bits(a) | sign_bit<V>()); }
template <class V> FUSEDKD_INLINE V abs(V a) { return (V)(bits(a) & ~sign_bit<V>()); }
template <class V>  // w x, and 0 where w is 0 whatever x (a NaN w stays NaN)
FUSEDKD_INLINE V mul0(V w, V x) {
  return w == V{} ? V{} : w * x;
}
template <class V>  // neither infinite nor NaN
FUSEDKD_INLINE typename Of<V>::I finite(V x) {
  return x - x == V{};
}
FUSEDKD_INLINE double total(VD v) {
  double sum = 0;
  for (size_t i = 0; i < sizeof v / sizeof sum; ++i) sum += v[i];
  return sum;
}
FUSEDKD_INLINE double total(VF v) {
  typedef float Half __attribute__((vector_size(FUSEDKD_VECTOR_BYTES / 2)));
  Half low, high;
  __builtin_memcpy(&low, &v, sizeof low);
  __builtin_memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  return total(__builtin_convertvector(low, VD) + __builtin_convertvector(high, VD));
}
template <class V> FUSEDKD_INLINE typename Of<V>::F largest(V v) {
  typename Of<V>::F lanes[sizeof(V) / sizeof(typename Of<V>::F)], m;
  store(lanes, v);
  m = lanes[0];
  for (auto lane : lanes) m = lane > m ? lane : m;
  return m;
}

// -------------------------------------------------------------------------------------------------
// powers of two

// 2^f for |f| <= 1/2 as 1 + f P(f), minimax: relative error 3e-9 (fp32), Taylor below 2^-53 (fp64).
FUSEDKD_INLINE VF exp2_fraction(VF f) {  // P(f)
  constexpr float c[6] = {0.693147182f,   0.240226477f,   0.0555035993f,
                          0.00961850584f, 0.00133908063f, 0.000153264613f};
  VF p = splat<VF>(c[5]);
  for (int k = 4; k >= 0; --k) p = fma(p, f, splat<VF>(c[k]));
  return p;
}
FUSEDKD_INLINE VD exp2_fraction(VD f) {
  VD p = {};
  double c = 1;
  double taylor[14];
  for (int k = 1; k <= 14; ++k) taylor[k - 1] = c = c * kLn2 / k;
  for (int k = 13; k >= 0; --k) p = fma(p, f, splat<VD>(taylor[k]));
  return p;
}

// x c = n + f with n whole, and 2^n. Adding 1.5 x 2^mantissa rounds to whole numbers and leaves n
// in the low bits.
template <class V> struct Split {
  V power, fraction;
  FUSEDKD_INLINE Split(V x, V c) {
    typedef Of<V> O;
    V z = x * c;
    // NaN stays; below the range the power is exactly 0, above it is infinite
    z = max(splat<V>(O::lowest_exponent), min(splat<V>(O::highest_exponent), z));
    const V magic = splat<V>(1.5 * ((int64_t)1 << O::mantissa));
    V t = z + magic;
    power = (V)((bits(t) + every<V>(O::bias)) << O::mantissa);
    // the product again, unrounded, but not where z was cut
    V f = fma(x, c, -(t - magic));
    fraction = abs(f) <= splat<V>(1) ? f : z - (t - magic);
  }
};

template <class V>  // 2^(x c), c > 0: any x, NaN included; 0 below the normal range
FUSEDKD_INLINE V exp2(V x, V c) {
  Split<V> s(x, c);
  return fma(s.fraction, exp2_fraction(s.fraction), splat<V>(1)) * s.power;
}

#if defined(FUSEDKD_AVX2) || defined(FUSEDKD_AVX512)
// 2^(j/32). In fp32 a root from registers and a short polynomial take fewer multiplications than a
// long one alone, and the multipliers are what the KL rows saturate.
// clang-format off
alignas(64) constexpr double kRoot[32] = {
    1.0, 1.0218971486541166, 1.0442737824274138, 1.0671404006768237, 1.0905077326652577,
    1.1143867425958924, 1.1387886347566916, 1.1637248587775775, 1.189207115002721,
    1.215247359980469, 1.241857812073484, 1.2690509571917332, 1.2968395546510096,
    1.3252366431597413, 1.3542555469368927, 1.383909881963832, 1.4142135623730951,
    1.4451808069770467, 1.4768261459394993, 1.5091644275934228, 1.5422108254079407,
    1.5759808451078865, 1.6104903319492543, 1.645755478153965, 1.681792830507429,
    1.718619298122478, 1.7562521603732995, 1.7947090750031072, 1.8340080864093424, 1.8741676341103,
    1.9152065613971474, 1.9571441241754002};
// clang-format on
#endif

#if defined(FUSEDKD_AVX512)
struct Roots {  // kRoot, in two registers
  Lanes<float>::U low, high;
  FUSEDKD_INLINE explicit Roots(double coefficient) {
    float root[32];
    for (int j = 0; j < 32; ++j) root[j] = (float)(kRoot[j] * coefficient);
    low = load<Lanes<float>::U>(root), high = load<Lanes<float>::U>(root + 16);
  }
  FUSEDKD_INLINE Lanes<float>::U at(VF index) const {
    return (Lanes<float>::U)_mm512_permutex2var_epi32((__m512i)low, (__m512i)bits(index),
                                                      (__m512i)high);
  }
};

struct RootSplit {  // x c = whole + f, whole in 32nds
  VF index, whole, f;
  FUSEDKD_INLINE RootSplit(VF x, VF c) {
    const VF magic = splat<VF>(1.5f * (1 << 18));
    index = fma(x, c, magic);
    whole = index - magic;
    f = fma(x, c, -whole);
  }
  FUSEDKD_INLINE VF growth() const {  // 2^f - 1, off by 1e-10
    return f * fma(f, fma(f, splat<VF>(0.0555036156f), splat<VF>(0.240228452f)),
                   splat<VF>(0.693147181f));
  }
};

FUSEDKD_INLINE VF exp2(VF x, VF c) {
  const VF bound = splat<VF>(200) / c;
  const Roots roots(1);
  RootSplit s(max(-bound, min(bound, x)), c);
  VF root = (VF)roots.at(s.index);
  return (VF)_mm512_scalef_ps((__m512)fma(root, s.growth(), root), (__m512)s.whole);
}
#endif

template <class V> FUSEDKD_INLINE V exp(V x) { return exp2(x, splat<V>(kLog2E)); }

// log of a positive normal number: 2 atanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)], exact
// near 1.
template <class V> FUSEDKD_INLINE V log_normal(V x) {
  typedef Of<V> O;
  const auto n = (typename O::I)(bits(x) - bits(splat<V>(0.70710678118654752440))) >> O::mantissa;
  V m = (V)(bits(x) - ((typename O::U)n << O::mantissa));
  V s = (m - 1) / (m + 1), s2 = s * s, p = {};
  for (int k = sizeof(typename O::F) == 4 ? 11 : 23; k >= 3; k -= 2)
    p = fma(p, s2, splat<V>(2.0 / k));
  V exponent = __builtin_convertvector(n, V);
  return fma(exponent, splat<V>(kLn2), fma(p * s2, s, s + s));
}

#if defined(FUSEDKD_AVX512)
// In fp32: m r = 1 + z with r near 1 / m from registers, and a quartic in z, off by 8e-9 and half
// as many steps one after the other as the quotient; both r next to m = 1 are 1, so that it is
// exact there too.
// clang-format off
alignas(64) constexpr float kInverse[32] = {
    // [1, 1.5) in 32nds, then [0.75, 1) in 64ths
    1.f, 0.955223858f, 0.927536249f,
    0.901408434f, 0.876712322f, 0.853333354f, 0.83116883f, 0.810126603f, 0.790123463f,
    0.771084309f, 0.752941191f, 0.735632181f, 0.719101131f, 0.703296721f, 0.688172042f,
    0.673684239f, 1.31958759f, 1.29292929f, 1.26732671f, 1.24271846f, 1.21904767f, 1.19626164f,
    1.17431188f, 1.15315318f, 1.13274336f, 1.11304343f, 1.09401715f, 1.07563031f, 1.0578512f,
    1.04065037f, 1.02400005f, 1.f};
alignas(64) constexpr float kLogInverse[32] = {
    // -log of them
    0.f, 0.0458095595f,
    0.0752234012f, 0.10379681f, 0.131576359f, 0.158605009f, 0.184922338f, 0.210564747f,
    0.235566065f, 0.259957552f, 0.283768147f, 0.307025045f, 0.32975328f, 0.351976395f,
    0.373716414f, 0.394993752f, -0.277319252f, -0.256910414f, -0.236909732f, -0.217301279f,
    -0.198069945f, -0.179201394f, -0.160682335f, -0.142500088f, -0.124642439f, -0.107098088f,
    -0.0898563787f, -0.072906822f, -0.0562396757f, -0.0398458727f, -0.0237165745f, 0.f};
// clang-format on

FUSEDKD_INLINE VF log_normal(VF x) {
  const auto look_up = [](const float* table, __m512i index) __attribute__((always_inline)) {
    return (VF)_mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
  };
  const VI n = (VI)(bits(x) - bits(splat<VF>(0.75f))) >> 23;
  const VF exponent = __builtin_convertvector(n, VF),
           m = (VF)(bits(x) - ((Lanes<float>::U)n << 23));
  const __m512i index = (__m512i)(bits(m) >> 18);
  const VF z = fma(m, look_up(kInverse, index), splat<VF>(-1)), z2 = z * z;
  const VF p =
      fma(z, fma(z, splat<VF>(-0.243952941f), splat<VF>(0.333365914f)), splat<VF>(-0.500001226f));
  return fma(exponent, splat<VF>(kLn2), look_up(kLogInverse, index)) + fma(z2, p, z);
}
#endif

template <class V> FUSEDKD_INLINE V log(V x) {
  typedef Of<V> O;
  const V y = log_normal(x);
  // NaN, 0 and infinity: not numbers whose bits mean what is said above
  return x > splat<V>(O::largest) ? x : x >= splat<V>(O::smallest) ? y : x - splat<V>(kInfinity);
}

template <class V>  // 2^(x c) - 1 for x c <= 0, without cancellation near 0
FUSEDKD_INLINE V exp2m1(V x, V c) {
  Split<V> s(x, c);
  return fma(s.power * s.fraction, exp2_fraction(s.fraction), s.power - splat<V>(1));
}
#if defined(FUSEDKD_AVX512)
FUSEDKD_INLINE VF exp2m1(VF x, VF c) {  // its instructions need no cuts but that of infinities
  const VF magic = splat<VF>(1.5f * (1 << 23)), most = splat<VF>(1e6f);
  const VF y = max(-most, min(most, x)), whole = fma(y, c, magic) - magic, f = fma(y, c, -whole);
  const VF power = (VF)_mm512_scalef_ps(_mm512_set1_ps(1), (__m512)whole);
  return fma(power * f, exp2_fraction(f), power - splat<VF>(1));
}
#endif

// A constant in two parts. What would be one rounding at random in a single entry is the same error
// in every entry of the row, and does not average out.
template <class F> struct Exact {
  F high = 0, low = 0;
  Exact() {}
  explicit Exact(double x) : high((F)x), low((F)(x - (double)high)) {}
};
template <class V, class F> FUSEDKD_INLINE V times(V x, Exact<F> c) {
  return fma(x, splat<V>(c.high), x * splat<V>(c.low));
}
template <class V, class F> FUSEDKD_INLINE V fma(V x, V y, Exact<F> c) {
  return fma(x, y, splat<V>(c.high)) + splat<V>(c.low);
}

// coefficient 2^(x c - r) for the hot loops, where x c lies within reach of the whole number r (see
// Reference::near): nothing is cut, and multiplying with the coefficient and with 2^-r is part of
// putting the exponent on. `fine` is right to the last digit also as a slope, for what subtracts
// neighbouring powers; else an error of 5e-8 may bend it. An exponent as an integer: those of near
// rows are small, the others' are not used.
FUSEDKD_INLINE int whole_number(double r) { return r > -4096 && r < 4096 ? (int)r : 0; }

template <class V, bool fine> struct NearPower {
  typedef typename Of<V>::F F;
  V c;
  typename Of<V>::U offset;
  Exact<F> coefficient;
  FUSEDKD_INLINE NearPower(F scale, double r, double coefficient)
      : c(splat<V>(scale)), offset(every<V>(Of<V>::bias - whole_number(r))),
        coefficient(coefficient) {}
  FUSEDKD_INLINE V operator()(V x) const {
    const V magic = splat<V>(1.5 * ((int64_t)1 << Of<V>::mantissa));
    V t = fma(x, c, magic), f = fma(x, c, -(t - magic));
    V power = times((V)((bits(t) + offset) << Of<V>::mantissa), coefficient);
    return fma(power * f, exp2_fraction(f), power);
  }
  FUSEDKD_INLINE V plus(V x, V sum) const { return sum + (*this)(x); }
};

#if defined(FUSEDKD_AVX512)
template <bool fine> struct NearPower<VF, fine> {
  VF c;
  Roots roots;
  FUSEDKD_INLINE NearPower(float scale, double r, double coefficient)
      : c(splat<VF>(scale)),
        roots(fine ? coefficient : coefficient / (kVertex * (double)kVertex + kHeight)) {
    Lanes<float>::U step;  // the root's index is added again with the exponent
    for (int j = 0; j < 16; ++j) step[j] = j << 18;
    step += every<VF>(whole_number(r)) << 23;
    roots.low -= step, roots.high -= step + (16 << 18);
  }
  FUSEDKD_INLINE VF operator()(VF x) const {
    const RootSplit s(x, c);
    return fine ? fma(power(s), s.growth(), power(s)) : power(s) * parabola(s, x);
  }
  FUSEDKD_INLINE VF plus(VF x, VF sum) const {
    if (fine) return sum + (*this)(x);
    const RootSplit s(x, c);
    return fma(power(s), parabola(s, x), sum);
  }

 private:
  // 2^f = ((f + vertex)^2 + height) / (vertex^2 + height), off by 5.3e-8: a multiplication less
  // than as a polynomial in f. The vertex has few digits, so that taking whole numbers off it
  // rounds nothing.
  static constexpr float kVertex = 11819.f / 8192, kHeight = 2.0813076f;
  FUSEDKD_INLINE VF parabola(const RootSplit& s, VF x) const {
    const VF from_vertex = fma(x, c, splat<VF>(kVertex) - s.whole);
    return fma(from_vertex, from_vertex, splat<VF>(kHeight));
  }
  FUSEDKD_INLINE VF power(const RootSplit& s) const {
    return (VF)(roots.at(s.index) + (bits(s.index) << 18));
  }
};
#elif defined(FUSEDKD_AVX2)
// 8 roots fill a register here, and a cubic is off by 2.5e-8, also as a slope.
template <bool fine> struct NearPower<VF, fine> {
  VF c;
  Lanes<float>::U roots;
  FUSEDKD_INLINE NearPower(float scale, double r, double coefficient) : c(splat<VF>(scale)) {
    float root[8];
    for (int j = 0; j < 8; ++j) root[j] = (float)(kRoot[4 * j] * coefficient);
    Lanes<float>::U step;  // the root's index is added again with the exponent
    for (int j = 0; j < 8; ++j) step[j] = j << 20;
    roots = load<Lanes<float>::U>(root) - step - (every<VF>(whole_number(r)) << 23);
  }
  FUSEDKD_INLINE VF operator()(VF x) const { return at<false>(x, x); }
  FUSEDKD_INLINE VF plus(VF x, VF sum) const { return at<true>(x, sum); }

 private:
  template <bool kSum> FUSEDKD_INLINE VF at(VF x, VF sum) const {
    const VF magic = splat<VF>(1.5f * (1 << 20));  // rounds to eighths
    VF index = fma(x, c, magic), f = fma(x, c, -(index - magic));
    VF slope =
        fma(f, fma(f, splat<VF>(0.0554962218f), splat<VF>(0.24025763f)), splat<VF>(0.693147214f));
    VF root = (VF)_mm256_permutevar8x32_ps((__m256)roots, (__m256i)bits(index));
    VF power = (VF)(bits(root) + (bits(index) << 20));
    if (kSum) return fma(power, fma(f, slope, splat<VF>(1)), sum);
    return fma(power, f * slope, power);
  }
};
#endif

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
