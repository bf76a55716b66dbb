// The base build of dense.h and sparse.h. Standard headers come first, so that none of their inline
// functions is compiled for it: the linker keeps one copy of those for the whole program, and it
// has to run on every machine.
#include <math.h>
#include <string.h>

#include <utility>

#include "kernel.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FUSEDKD_ISA base
#define FUSEDKD_STRING_(x) #x
#define FUSEDKD_STRING(x) FUSEDKD_STRING_(x)
#define FUSEDKD_VECTOR_BYTES 16

#include "sparse.h"

namespace fusedkd {
const InstructionSet& base_set() { return base::kSet; }
}  // namespace fusedkd
