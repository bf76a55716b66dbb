// out = a @ b (+ out) with bf16 operands and sums in fp32, which torch.mm has on GPUs only.
//
// The arithmetic is oneDNN's, through the micro-kernel that torch itself uses in flash attention
// (at::native::cpublas::brgemm: AVX512-BF16 or AMX, whichever the processor has). Here is only the
// blocking, and the packing of b into pairs along K ("VNNI"), which that kernel wants. The symbol
// is not part of torch's stable ABI, so it is bound weakly by name: where it is missing, or the
// processor has no such instructions, matmul_supported() says no and Python multiplies otherwise.

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "memory.h"
#include "tensors.h"

using fusedkd::ScalarType;
using fusedkd::Scratch;
using fusedkd::Tensor;

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#define BOUND_AS(symbol) __asm__(symbol) __attribute__((weak))
extern "C" {
void brgemm_bf16(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                 const uint16_t* a, const uint16_t* b, float* c, bool vnni)
    BOUND_AS("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
void brgemm_release(bool vnni) BOUND_AS("_ZN2at6native7cpublas14brgemm_releaseEb");
}
static bool supported() {
  return brgemm_bf16 != nullptr && brgemm_release != nullptr &&
         __builtin_cpu_supports("avx512bf16");
}
static bool has_amx() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#else
static void brgemm_bf16(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*,
                        const uint16_t*, float*, bool) {}
static void brgemm_release(bool) {}
static bool supported() { return false; }
static bool has_amx() { return false; }
#endif

namespace {

// Tile of the result, and the stretch of K packed at a time: b's share is 128 KiB, in L2. What is
// packed begins at a cache line: loads that cross two take twice as long (AMX: whole products 1.5
// to 1.8x, Granite Rapids, 2026-11-26).
constexpr int64_t kRows = 64, kColumns = 64, kDepth = 1024;

struct Matrix {
  const uint16_t* data;
  int64_t row, column;  // strides

  explicit Matrix(const Tensor& t)
      : data(fusedkd::pointer<uint16_t>(t)), row(t.stride(0)), column(t.stride(1)) {}

  Matrix(const uint16_t* data, int64_t row, int64_t column)
      : data(data), row(row), column(column) {}

  Matrix transposed() const { return {data, column, row}; }
  const uint16_t* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Packing moves pairs of bf16 as 32-bit numbers, 16 x 16 of them at a time: one by one it takes as
// long as the product of 64 rows. Only where supported() said yes.
constexpr int64_t kBlock = 16;
#if defined(__x86_64__)
#define PACKING __attribute__((target("avx512f,avx512bw,avx512vl")))

PACKING void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // now quarters of registers
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88),
                  b = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd),
                  d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// to[c][r] = from[r][c] for 16 x 16 pairs; strides in bf16.
PACKING void transpose_pairs(const uint16_t* from, int64_t stride, uint16_t* to,
                             int64_t to_stride) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * stride);
  transpose(x);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, x[i]);
}

// to[c][r] = from[r][c] for 16 x 16 numbers, past the caches: what is written is not read before
// all of it has been.
PACKING void transpose_out(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(from + i * stride);
  transpose(x);
  for (int i = 0; i < 16; ++i)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * to_stride), x[i]);
}

PACKING __m512i interleave(const uint16_t* first, const uint16_t* second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  if (second == nullptr) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// to[j] = the pair (first[j], second[j]), 16 of them
PACKING void pair_rows(const uint16_t* first, const uint16_t* second, uint16_t* to) {
  _mm512_storeu_si512(to, interleave(first, second));
}
// to[i][k] = from[k][i] for 16 i and 32 k, of which those from `depth` on are 0.
PACKING void transpose_rows(const uint16_t* from, int64_t stride, int64_t depth, uint16_t* to,
                            int64_t to_stride) {
  __m512i x[16];
  for (int64_t k = 0; k < 2 * kBlock; k += 2)
    x[k / 2] =
        k < depth ? interleave(from + k * stride, k + 1 < depth ? from + (k + 1) * stride : nullptr)
                  : _mm512_setzero_si512();
  transpose(x);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, x[i]);
}
#else
void transpose_pairs(const uint16_t*, int64_t, uint16_t*, int64_t) {}
void pair_rows(const uint16_t*, const uint16_t*, uint16_t*) {}
void transpose_rows(const uint16_t*, int64_t, int64_t, uint16_t*, int64_t) {}
void transpose_out(const float*, int64_t, float*, int64_t) {}
#endif

// b[k0:k0+depth, n0:n0+columns] as [padded / 2][columns][2], zero from `depth` on.
void pack_pairs(const Matrix& b, int64_t k0, int64_t depth, int64_t padded, int64_t n0,
                int64_t columns, uint16_t* out) {
  const int64_t blocked = columns / kBlock * kBlock;  // columns that go by blocks
  int64_t k = 0;
  if (b.row == 1)  // the pair lies together: a transposed weight
    for (; k + 2 * kBlock <= depth; k += 2 * kBlock)
      for (int64_t j = 0; j < blocked; j += kBlock)
        transpose_pairs(b.at(k0 + k, n0 + j), b.column, out + k * columns + 2 * j, 2 * columns);
  const int64_t done = k;
  for (k = 0; k < depth; k += 2) {
    uint16_t* to = out + k * columns;
    const uint16_t *first = b.at(k0 + k, n0), *second = first + b.row;
    const bool pair = k + 1 < depth;
    int64_t j = k < done ? blocked : 0;
    if (b.column == 1 && pair)
      for (; j + kBlock <= columns; j += kBlock) pair_rows(first + j, second + j, to + 2 * j);
    for (; j < columns; ++j)
      to[2 * j] = first[j * b.column], to[2 * j + 1] = pair ? second[j * b.column] : 0;
  }
  std::fill(out + k * columns, out + padded * columns, uint16_t{0});
}

// a[m0:m0+rows, k0:k0+depth] row-major, zero from `depth` to `padded`: in place where it is so.
const uint16_t* row_major(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
                          int64_t padded, Scratch& scratch, int64_t& leading) {
  if (a.column == 1 && depth == padded) {
    leading = a.row;
    return a.at(m0, k0);
  }
  leading = padded;
  uint16_t* buffer = scratch.at_least<uint16_t>(rows * padded);
  int64_t blocked = 0;
  if (a.row == 1) {  // the transposed gradient of logits
    blocked = rows / kBlock * kBlock;
    for (int64_t k = 0; k < depth; k += 2 * kBlock)
      for (int64_t i = 0; i < blocked; i += kBlock)
        transpose_rows(a.at(m0 + i, k0 + k), a.column, depth - k, buffer + i * padded + k, padded);
  }
  for (int64_t i = blocked; i < rows; ++i) {
    uint16_t* to = buffer + i * padded;
    for (int64_t k = 0; k < depth; ++k) to[k] = *a.at(m0 + i, k0 + k);
    std::fill(to + depth, to + padded, uint16_t{0});
  }
  return buffer;
}

// out[j][i] = tile[i][j], both by whole cache lines in i.
void store_transposed(const float* tile, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t leading) {
  const int64_t blocked = columns / kBlock * kBlock;
  for (int64_t j = 0; j < blocked; j += kBlock)
    for (int64_t i = 0; i < rows; i += kBlock)
      transpose_out(tile + i * stride + j, stride, out + j * leading + i, leading);
  for (int64_t j = blocked; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * leading + i] = tile[i * stride + j];
}

struct Result {
  float* data;
  int64_t leading;
};

struct Product {
  Matrix a, b;
  Result out;
  int64_t m, n, k;
  bool accumulate;

  // Of what is summed over: whole pairs, and where a is copied anyhow whole cache lines.
  int64_t padded(int64_t depth) const {
    const int64_t whole = a.column == 1 && depth % 2 == 0 ? 2 : 2 * kBlock;
    return (depth + whole - 1) / whole * whole;
  }
  int64_t blocks() const { return (n + kColumns - 1) / kColumns; }
  int64_t columns(int64_t block) const { return std::min(kColumns, n - block * kColumns); }

  // Wide results: each thread packs its own columns of b and passes all rows of a, of which a
  // stretch of k stays in cache.
  void by_columns() const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t from, int64_t to) {
      Scratch packed, scratch;
      for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, k - k0), whole = padded(depth);
        for (int64_t block = from; block < to; ++block) {
          const int64_t n0 = block * kColumns;
          uint16_t* share = packed.at_least<uint16_t>(whole * kColumns);
          pack_pairs(b, k0, depth, whole, n0, columns(block), share);
          for (int64_t i = 0; i < m; i += kRows) {
            int64_t rows = std::min(kRows, m - i), lda;
            const uint16_t* part = row_major(a, i, rows, k0, depth, whole, scratch, lda);
            brgemm_bf16(rows, columns(block), whole, lda, columns(block), out.leading,
                        accumulate || k0 > 0, part, share, out.data + i * out.leading + n0, true);
          }
        }
      }
      brgemm_release(true);
    });
  }

  // Tall results: b is packed once for all, each thread takes rows of a, and finishes them.
  // `transposed`: out is (n, m), and nothing is added to what it holds.
  void by_rows(bool transposed) const {
    const int64_t wide = blocks() * kColumns, stretches = (k + kDepth - 1) / kDepth;
    Scratch memory;
    uint16_t* packed = memory.at_least<uint16_t>(wide * (k + 2 * kBlock));
    auto share = [&](int64_t k0,
                     int64_t block) {  // of b: `wide` columns of each stretch, by blocks
      return packed + k0 * wide + block * kColumns * padded(std::min(kDepth, k - k0));
    };
    torch::stable::parallel_for(0, stretches * blocks(), 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) {
        const int64_t k0 = part / blocks() * kDepth, block = part % blocks();
        const int64_t depth = std::min(kDepth, k - k0);
        pack_pairs(b, k0, depth, padded(depth), block * kColumns, columns(block), share(k0, block));
      }
    });
    torch::stable::parallel_for(0, (m + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
      Scratch scratch, finished;
      for (int64_t i = from * kRows; i < std::min(m, to * kRows); i += kRows) {
        const int64_t rows = std::min(kRows, m - i), stride = transposed ? wide : out.leading;
        float* tile =
            transposed ? finished.at_least<float>(kRows * wide) : out.data + i * out.leading;
        for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
          int64_t depth = std::min(kDepth, k - k0), whole = padded(depth), lda;
          const uint16_t* part = row_major(a, i, rows, k0, depth, whole, scratch, lda);
          for (int64_t block = 0; block < blocks(); ++block) {
            if (accumulate && k0 == 0) fetch(i + rows, block);
            brgemm_bf16(rows, columns(block), whole, lda, columns(block), stride,
                        accumulate || k0 > 0, part, share(k0, block), tile + block * kColumns,
                        true);
          }
        }
        if (transposed) store_transposed(tile, stride, rows, n, out.data + i, out.leading);
      }
      brgemm_release(true);
    });
  }

  // Ahead of its turn, a tile of what is added up: hardware does not see it coming. With AMX, whose
  // tiles are done before the memory is there, the sum took 1.28x as long for it (176 tokens x 896
  // x 151,936, Granite Rapids, 2026-11-26).
  void fetch(int64_t m0, int64_t block) const {
    static const bool waits = has_amx();
    for (int64_t i = m0; !waits && i < std::min(m, m0 + kRows); ++i)
      for (int64_t j = 0; j < columns(block); j += 16)
        __builtin_prefetch(out.data + i * out.leading + block * kColumns + j, 1, 2);
  }
};

}  // namespace

// Whether matmul() works on this machine.
bool matmul_supported() { return supported(); }

// out (m, n) fp32 with unit column stride; a (m, k) and b (k, n) bf16 with any strides.
void matmul(Tensor out, Tensor a, Tensor b, bool accumulate) {
  STD_TORCH_CHECK(supported(), "matmul: needs AVX512-BF16");
  STD_TORCH_CHECK(
      a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16 &&
          out.scalar_type() == ScalarType::Float && out.stride(1) == 1 &&
          out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
      "matmul: expected (m, k) and (k, n) in bf16, (m, n) in fp32");
  const Result result{fusedkd::pointer<float>(out), out.stride(0)};
  const Product product{Matrix(a), Matrix(b), result, a.size(0), b.size(1), a.size(1), accumulate};
  if (product.n < product.m) return product.by_rows(false);
  // Logits: the weight's rows are taken as they lie and the few tokens are packed. For V = 151,936
  // that takes 0.6 to 0.9 of the time of packing the weight (64 to 512 tokens, H = 896 and 1,536,
  // Granite Rapids, 2026-11-26).
  const int64_t line = 16;  // numbers in a cache line
  const bool lines = product.n % line == 0 && result.leading % line == 0 &&
                     reinterpret_cast<uintptr_t>(result.data) % 64 == 0;
  if (!accumulate && lines && product.k <= product.n) {
    const Product other{product.b.transposed(),
                        product.a.transposed(),
                        result,
                        product.n,
                        product.m,
                        product.k,
                        false};
    return other.by_rows(true);
  }
  product.by_columns();
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("matmul_supported() -> bool");
  m.def("matmul(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("matmul_supported", TORCH_BOX(&matmul_supported));
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul)); }
