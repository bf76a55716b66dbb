// The avx2 build of dense.h and sparse.h. Standard headers come first, so that none of their inline
// functions is compiled for it: the linker keeps one copy of those for the whole program, and it
// has to run on every machine.
#include <math.h>
#include <string.h>

#include <utility>

#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FUSEDKD_ISA avx2
#define FUSEDKD_AVX2
#define FUSEDKD_STRING_(x) #x
#define FUSEDKD_STRING(x) FUSEDKD_STRING_(x)
#define FUSEDKD_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
// Sixteen registers hold neither a divergence nor two: without the scheduler, GCC 12 spills so much
// that JSD takes 4.7 ns an entry instead of 2.5, and forward KL 0.75 instead of 0.73 (first sweeps,
// Zen 3, 2026-11-24).
#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "sched-pressure")
#pragma GCC target("avx2,fma,tune=haswell")
#endif

#include "sparse.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedkd {
const InstructionSet& avx2_set() { return avx2::kSet; }
}  // namespace fusedkd

#endif
