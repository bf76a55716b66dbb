// What a divergence of one's own may be made of, beside what vec.h has for ours: any argument, and
// at infinities, 0 and NaN what torch answers.
#pragma once

#include "vec.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

template <class V> FUSEDKD_INLINE V sqrt(V x) {
#if defined(FUSEDKD_AVX512)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_sqrt_ps((__m512)x);
  else return (V)_mm512_sqrt_pd((__m512d)x);
#elif defined(FUSEDKD_AVX2)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm256_sqrt_ps((__m256)x);
  else return (V)_mm256_sqrt_pd((__m256d)x);
#else
  for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}
template <class V> FUSEDKD_INLINE V sign(V x) {
  const V one = splat<V>(1);
  return x > V{} ? one : x < V{} ? -one : x * V{};
}
template <class V>
FUSEDKD_INLINE V not_negative(V x) {  // NaN elsewhere: vec.h's log has -inf there
  return x < V{} ? splat<V>(__builtin_nan("")) : x;
}
template <class V> FUSEDKD_INLINE V log_of(V x) {  // of numbers below the normal ones too
  constexpr int up = sizeof(x[0]) == 4 ? 24 : 53;
  const auto small = x < splat<V>(Of<V>::smallest);
  const V y = log(not_negative(small ? x * splat<V>((double)(1LL << up)) : x));
  return small ? y - splat<V>(up * kLn2) : y;
}
template <class V> FUSEDKD_INLINE V log1p(V x) {
  const V y = splat<V>(1) + x, plain = log_of(y);
  const V corrected = plain + (x - (y - splat<V>(1))) / y;
  return (y > V{}) & (y < splat<V>(Of<V>::largest)) ? corrected : plain;
}
template <class V> FUSEDKD_INLINE V expm1(V x) {
  const V most = splat<V>(sizeof(x[0]) == 4 ? 60 : 600);
  const V near = exp2m1(min(most, x), splat<V>(kLog2E));
  return x > most ? exp(x) : near;
}
template <class V> FUSEDKD_INLINE V sigmoid(V x) { return splat<V>(1) / (splat<V>(1) + exp(-x)); }
template <class V> FUSEDKD_INLINE V tanh(V x) {
  const V t = expm1(splat<V>(2) * minus_abs(x)), size = -t / (splat<V>(2) + t);
  return x < V{} ? -size : size;
}
template <class V> FUSEDKD_INLINE V logaddexp(V a, V b) {
  const V larger = a > b ? a : b;
  const V sum = larger + log1p(exp(minus_abs(a - b)));
  return a == b ? a + splat<V>(kLn2) : (a != a) | (b != b) ? a + b : sum;
}
// By exp and log where that does: of bases that are not negative. The others are few.
template <class V> FUSEDKD_INLINE V pow(V x, V y) {
  auto negative = x < V{};
  V power = exp(y * log_of(negative ? splat<V>(1) : x));
  power = y == V{} ? splat<V>(1) : power;
  for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i)
    if (negative[i]) power[i] = ::pow((double)x[i], (double)y[i]);
  return power;
}
template <class V> FUSEDKD_INLINE typename Of<V>::I every_lane(bool mask) {
  return mask ? ~typename Of<V>::I{} : typename Of<V>::I{};
}

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
