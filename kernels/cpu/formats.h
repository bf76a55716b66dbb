// Between the memory's number formats and tiles of fp32 or fp64, with the logits' transform on the
// way. Plain loops that compilers vectorise for the instruction set that is switched on.
#pragma once

#include "vec.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

template <class To, class From> FUSEDKD_INLINE To as_bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y, "");
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

FUSEDKD_INLINE float from_bf16(uint16_t h) { return as_bits<float>((uint32_t)h << 16); }

FUSEDKD_INLINE float from_f16(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
  float x = as_bits<float>(magnitude) * 0x1p112f;  // also right for subnormals
  uint32_t u = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : as_bits<uint32_t>(x);
  return as_bits<float>(u | (uint32_t)(h & 0x8000) << 16);
}

// To nearest, ties to even; NaN stays NaN.
FUSEDKD_INLINE uint16_t to_bf16(float x) {
  uint32_t u = as_bits<uint32_t>(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (uint16_t)(x == x ? rounded : 0x7fc0);
}

FUSEDKD_INLINE uint16_t to_f16(float x) {
  uint32_t u = as_bits<uint32_t>(x), sign = u & 0x80000000u;
  u ^= sign;
  uint32_t normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  // below 2^-14 adding 1/2 lets the adder round to multiples of 2^-24
  uint32_t tiny = as_bits<uint32_t>(as_bits<float>(u) + 0.5f) - 0x3f000000u;
  uint32_t h = u < (113u << 23) ? tiny : normal;
  h = u >= 0x477ff000u ? 0x7c00u : h;  // 65520 and more
  h = u > 0x7f800000u ? 0x7e00u : h;
  return (uint16_t)(h | sign >> 16);
}

// fp64 to fp32 such that a second rounding, to fewer bits, gives what one rounding would have
// (round to odd).
FUSEDKD_INLINE float to_odd(double x) {
  float f = (float)x;
  if ((double)f == x || f != f) return f;
  uint32_t u = as_bits<uint32_t>(f);
  if ((f < 0 ? -(double)f : (double)f) > (x < 0 ? -x : x)) --u;  // towards zero
  return as_bits<float>(u | 1u);
}
FUSEDKD_INLINE float to_odd(float x) { return x; }

template <DType d> struct Stored;
template <> struct Stored<DType::f64> {
  typedef double T;
  FUSEDKD_INLINE static double get(T x) { return x; }
  template <class F> FUSEDKD_INLINE static T put(F x) { return x; }
};
template <> struct Stored<DType::f32> {
  typedef float T;
  FUSEDKD_INLINE static float get(T x) { return x; }
  template <class F> FUSEDKD_INLINE static T put(F x) { return (float)x; }
};
template <> struct Stored<DType::bf16> {
  typedef uint16_t T;
  FUSEDKD_INLINE static float get(T x) { return from_bf16(x); }
  template <class F> FUSEDKD_INLINE static T put(F x) { return to_bf16(to_odd(x)); }
};
template <> struct Stored<DType::f16> {
  typedef uint16_t T;
  FUSEDKD_INLINE static float get(T x) { return from_f16(x); }
  template <class F> FUSEDKD_INLINE static T put(F x) { return to_f16(to_odd(x)); }
};

template <DType d, class F> void read(const void* from, F* to, int64_t n) {
  const auto* p = (const typename Stored<d>::T*)from;
  for (int64_t i = 0; i < n; ++i) to[i] = (F)Stored<d>::get(p[i]);
}
template <class F> void read(DType d, const void* from, F* to, int64_t n) {
  switch (d) {
    case DType::f64: return read<DType::f64>(from, to, n);
    case DType::f32: return read<DType::f32>(from, to, n);
    case DType::bf16: return read<DType::bf16>(from, to, n);
    case DType::f16: return read<DType::f16>(from, to, n);
  }
}

template <DType d, class F> void write(const F* from, void* to, int64_t n) {
  auto* p = (typename Stored<d>::T*)to;
  for (int64_t i = 0; i < n; ++i) p[i] = Stored<d>::put(from[i]);
}
template <class F> void write(DType d, const F* from, void* to, int64_t n) {
  switch (d) {
    case DType::f64: return write<DType::f64>(from, to, n);
    case DType::f32: return write<DType::f32>(from, to, n);
    case DType::bf16: return write<DType::bf16>(from, to, n);
    case DType::f16: return write<DType::f16>(from, to, n);
  }
}

FUSEDKD_INLINE void fill(DType d, double x, void* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) write(d, &x, (char*)to + i * size_of(d), 1);
}
FUSEDKD_INLINE void zero(DType d, void* to, int64_t n) { memset(to, 0, n * size_of(d)); }

FUSEDKD_INLINE bool transforms(const Logits& side) { return side.scale != 1 || side.softcap != 0; }

// In place: x becomes softcap tanh(scale x / softcap); its derivative, where it is asked for, goes
// to `slope`.
template <class F> void transform(const Logits& side, F* x, F* slope, int64_t n) {
  typedef typename Lanes<F>::V V;
  constexpr int64_t lanes = sizeof(V) / sizeof(F);
  const V scale = splat<V>(side.scale), cap = splat<V>(side.softcap), one = splat<V>(1);
  for (int64_t i = 0; i < n; i += lanes) {
    V y = load<V>(x + i) * scale, d = scale;
    if (side.softcap != 0) {
      V u = y / cap, e = exp2m1(abs(u), splat<V>(-2 * kLog2E)), over = one / (e + 2);
      V h = -e * over;
      y = cap * (u < V{} ? -h : h);
      d = scale * 4 * ((e + 1) * over) * over;  // 1 - tanh^2, without its cancellation
    }
    store(x + i, y);
    if (slope) store(slope + i, d);
  }
}

// One logit after the transform, and the derivative there.
FUSEDKD_INLINE double logit(const Logits& side, const void* row, int64_t column, double* slope) {
  double x;
  read(side.dtype, (const char*)row + column * size_of(side.dtype), &x, 1);
  *slope = side.scale;
  if (!transforms(side)) return x;
  x *= side.scale;
  if (side.softcap == 0) return x;
  double h = ::tanh(x / side.softcap);
  *slope *= 1 - h * h;
  return side.softcap * h;
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
