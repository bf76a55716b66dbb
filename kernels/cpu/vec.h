// Vectors of one instruction set and the functions that divergences are made of. Included by each rows_<isa>.cpp after
// it has switched its instruction set on, so everything here lives in a namespace of its own and uses no C++ library.
//
// GCC's vector extensions (clang has them too) carry the arithmetic; intrinsics appear where they pay.
#pragma once

namespace fusedkd {
namespace FUSEDKD_ISA {

#define FUSEDKD_INLINE inline __attribute__((always_inline))

template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));
};
typedef Lanes<float>::V VF;
typedef Lanes<float>::I VI;
typedef Lanes<double>::V VD;
typedef Lanes<double>::I VL;
typedef uint16_t VH __attribute__((vector_size(FUSEDKD_VECTOR_BYTES)));

template <class V>
struct Of;  // lane type F, integers I as wide, and numbers of the format
template <>
struct Of<VF> {
  typedef float F;
  typedef VI I;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr F lowest_exponent = -127, highest_exponent = 128;
  static constexpr F largest = 3.402823466e38f, smallest = 1.17549435e-38f;
};
template <>
struct Of<VD> {
  typedef double F;
  typedef VL I;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr F lowest_exponent = -1023, highest_exponent = 1024;
  static constexpr F largest = 1.7976931348623157e308, smallest = 2.2250738585072014e-308;
};

constexpr double kInfinity = __builtin_inf();
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class V>
FUSEDKD_INLINE V splat(typename Of<V>::F x) {
  return V{} + x;
}
template <class V, class T>
FUSEDKD_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FUSEDKD_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// Past the caches, to memory that is not read again soon; p is aligned to a vector. With AVX2 it gains nothing (32.5 ms
// against 31.7, 128 x 151,936 in bf16, 2 cores of Zen 3, 2026-11-24).
template <class T, class V>
FUSEDKD_INLINE void stream_store(T* p, V v) {
#if defined(FUSEDKD_AVX512)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#else
  store(p, v);
#endif
}
template <class V>
FUSEDKD_INLINE typename Of<V>::I bits(V v) {
  return (typename Of<V>::I)v;
}

// a b + c with one rounding, except on the base set of x86, which has no such instruction (contraction is off).
#if defined(FUSEDKD_AVX512)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(FUSEDKD_AVX2)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
FUSEDKD_INLINE VF fma(VF a, VF b, VF c) { return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FUSEDKD_INLINE VD fma(VD a, VD b, VD c) { return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
#define FUSEDKD_NO_FMA
template <class V>
FUSEDKD_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// Of two operands one of which is NaN, the second: so max(bound, x) keeps a NaN x.
template <class V>
FUSEDKD_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FUSEDKD_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FUSEDKD_INLINE V abs(V a) {
  return max(-a, a);
}
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
template <class V>
FUSEDKD_INLINE typename Of<V>::F largest(V v) {
  typename Of<V>::F lanes[sizeof(V) / sizeof(typename Of<V>::F)], m;
  store(lanes, v);
  m = lanes[0];
  for (auto lane : lanes) m = lane > m ? lane : m;
  return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// powers of two

// 2^f for |f| <= 1/2 as 1 + f P(f), minimax: relative error 3e-9 (fp32), Taylor below 2^-53 (fp64).
FUSEDKD_INLINE VF exp2_fraction(VF f) {  // P(f)
  constexpr float c[6] = {0.693147182f, 0.240226477f, 0.0555035993f, 0.00961850584f, 0.00133908063f, 0.000153264613f};
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

// x c = n + f with n whole, and 2^n. Adding 1.5 x 2^mantissa rounds to whole numbers and leaves n in the low bits.
template <class V>
struct Split {
  V power, fraction;
  FUSEDKD_INLINE Split(V x, V c) {
    typedef Of<V> O;
    V z = x * c;
    // NaN stays; below the range the power is exactly 0, above it is infinite
    z = max(splat<V>(O::lowest_exponent), min(splat<V>(O::highest_exponent), z));
    const V magic = splat<V>(1.5 * ((int64_t)1 << O::mantissa));
    V t = z + magic;
    power = (V)((bits(t) + O::bias) << O::mantissa);
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

#if defined(FUSEDKD_AVX512)
// In fp32: 2^(j/16) from a register and a cubic, 10 to 12 instructions of which 6 multiply, against 12 and 9 for a
// polynomial alone; the multipliers are what the KL rows saturate. At most 1 ulp; the cubic's share is 1.6e-9. (32 roots
// and a quadratic save a multiplication, and are off by 1.5e-5 in slope: at T = 1000 that is what total variation sees.)
alignas(64) constexpr float kRoot[16] = {
    1.000000000f, 1.044273782f, 1.090507733f, 1.138788635f, 1.189207115f, 1.241857812f, 1.296839555f, 1.354255547f,
    1.414213562f, 1.476826146f, 1.542210825f, 1.610490332f, 1.681792831f, 1.756252160f, 1.834008086f, 1.915206561f};

struct RootSplit {
  VF index, whole, growth;  // x c = whole + f, whole in 16ths; growth = 2^f - 1
  FUSEDKD_INLINE RootSplit(VF x, VF c) {
    const VF magic = splat<VF>(1.5f * (1 << 19));
    index = fma(x, c, magic);
    whole = index - magic;
    VF f = fma(x, c, -whole);
    growth = f * fma(f, fma(f, splat<VF>(0.0555023588f), splat<VF>(0.240234286f)), splat<VF>(0.693147182f));
  }
};

FUSEDKD_INLINE VF exp2(VF x, VF c) {
  const VF bound = splat<VF>(200) / c;
  RootSplit s(max(-bound, min(bound, x)), c);
  VF root = (VF)_mm512_permutexvar_ps((__m512i)bits(s.index), _mm512_load_ps(kRoot));
  return (VF)_mm512_scalef_ps((__m512)fma(root, s.growth, root), (__m512)s.whole);
}
#endif

template <class V>
FUSEDKD_INLINE V exp(V x) {
  return exp2(x, splat<V>(kLog2E));
}

// log of a positive normal number: 2 atanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)], exact near 1.
template <class V>
FUSEDKD_INLINE V log_normal(V x) {
  typedef Of<V> O;
  typedef typename O::I I;
  const I half = bits(splat<V>(0.70710678118654752440));
  I n = (bits(x) - half) >> O::mantissa;
  V m = (V)(bits(x) - (n << O::mantissa));
  V s = (m - 1) / (m + 1), s2 = s * s, p = {};
  for (int k = sizeof(typename O::F) == 4 ? 11 : 23; k >= 3; k -= 2) p = fma(p, s2, splat<V>(2.0 / k));
  V exponent = __builtin_convertvector(n, V);
  return fma(exponent, splat<V>(kLn2), fma(p * s2, s, s + s));
}

template <class V>
FUSEDKD_INLINE V log(V x) {
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

// 2^(x c - r) for the hot loops, where x c lies within reach of the whole number r (see Reference::near): nothing is
// cut, and subtracting r is part of putting the exponent on.
template <class V>
struct NearPower {
  V c;
  typename Of<V>::I offset;
  FUSEDKD_INLINE NearPower(typename Of<V>::F scale, double r)
      : c(splat<V>(scale)), offset((typename Of<V>::I{}) + (Of<V>::bias - (int)r)) {}
  FUSEDKD_INLINE V operator()(V x) const {
    const V magic = splat<V>(1.5 * ((int64_t)1 << Of<V>::mantissa));
    V t = fma(x, c, magic), f = fma(x, c, -(t - magic));
    V power = (V)((bits(t) + offset) << Of<V>::mantissa);
    return fma(power * f, exp2_fraction(f), power);
  }
};

#if defined(FUSEDKD_AVX2)
// In fp32: 2^(j/8) from a register and a cubic, 10 instructions of which 6 multiply, against 12 and 9 for a polynomial
// alone: 1.15x the speed of the KL sweeps (Zen 3, 2026-11-24). The cubic's share of the error is 2.6e-8, under half an ulp.
alignas(32) constexpr float kRoot[8] = {1.000000000f, 1.090507733f, 1.189207115f, 1.296839555f,
                                        1.414213562f, 1.542210825f, 1.681792831f, 1.834008086f};

template <>
struct NearPower<VF> {
  VF c, roots;
  FUSEDKD_INLINE NearPower(float scale, double r) : c(splat<VF>(scale)) {
    int32_t less[8];  // the root's index is added again with the exponent
    for (int j = 0; j < 8; ++j) less[j] = (j << 20) + (int)r * (1 << 23);
    roots = (VF)(load<VI>(kRoot) - load<VI>(less));
  }
  FUSEDKD_INLINE VF operator()(VF x) const {
    const VF magic = splat<VF>(1.5f * (1 << 20));  // rounds to eighths
    VF index = fma(x, c, magic), f = fma(x, c, -(index - magic));
    VF growth = f * fma(f, fma(f, splat<VF>(0.0555047467f), splat<VF>(0.240257487f)), splat<VF>(0.693147182f));
    VF root = (VF)_mm256_permutevar8x32_ps((__m256)roots, (__m256i)bits(index));
    VF power = (VF)(bits(root) + (bits(index) << 20));
    return fma(power, growth, power);
  }
};
#endif

#if defined(FUSEDKD_AVX512)
template <>
struct NearPower<VF> {
  VF c;
  __m512i roots;
  FUSEDKD_INLINE NearPower(float scale, double r) : c(splat<VF>(scale)) {
    int32_t less[16];  // the root's index is added again with the exponent
    for (int j = 0; j < 16; ++j) less[j] = (j << 19) + (int)r * (1 << 23);
    roots = (__m512i)(load<VI>(kRoot) - load<VI>(less));
  }
  FUSEDKD_INLINE VF operator()(VF x) const {
    RootSplit s(x, c);
    VI root = (VI)_mm512_permutexvar_epi32((__m512i)bits(s.index), roots);
    VF power = (VF)(root + (bits(s.index) << 19));
    return fma(power, s.growth, power);
  }
};
#endif

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
