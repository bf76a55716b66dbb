// The avx512 build of dense.h and sparse.h. Standard headers come first, so that none of their
// inline functions is compiled for it: the linker keeps one copy of those for the whole program,
// and it has to run on every machine.
#include <math.h>
#include <string.h>

#include <utility>

#include "kernel.h"

#if defined(__x86_64__)
#if defined(FUSEDKD_EMULATE_AVX512)  // `make test-avx512`: the same code where there are no such
                                     // instructions, slow
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#define _mm512_stream_si512(p, v) (*(p) = (v))
#else
#include <immintrin.h>
#endif

#define FUSEDKD_ISA avx512
#define FUSEDKD_AVX512
#define FUSEDKD_STRING_(x) #x
#define FUSEDKD_STRING(x) FUSEDKD_STRING_(x)
#define FUSEDKD_VECTOR_BYTES 64
#if defined(FUSEDKD_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

#include "sparse.h"

#if defined(FUSEDKD_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedkd {
const InstructionSet& avx512_set() { return avx512::kSet; }
}  // namespace fusedkd

#endif
