// A gradient times what came from above.
#pragma once

#include "formats.h"

namespace fusedkd {
namespace FUSEDKD_ISA {

inline void scale(const ScaleCall& call, int64_t row) {
  const double factor = call.factors[call.per_row ? row : 0];
  const bool in_place = call.out == call.data;
  if (in_place && factor == 1) return;
  const int64_t start =
      row / call.inner_rows * call.stride_outer + row % call.inner_rows * call.stride_inner;
  const char* data = (const char*)call.data + start * size_of(call.dtype);
  char* out =
      (char*)call.out + (in_place ? start : row * call.out_stride) * size_of(call.out_dtype);
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

}  // namespace FUSEDKD_ISA
}  // namespace fusedkd
