// out (+)= a @ b with bf16 operands and fp32 results, which torch.mm has on GPUs only.
//
// The arithmetic is oneDNN's, through the micro-kernel that torch itself uses in flash attention
// (at::native::cpublas::brgemm: AVX512-BF16 or AMX, whichever the processor has). Here is only the
// blocking, and the packing of b into pairs along K ("VNNI"), which that kernel wants. The symbol
// is not part of torch's stable ABI, so it is bound weakly by name: where it is missing, or the
// processor has no such instructions, matmul_supported() says no and Python multiplies otherwise.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
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
  return brgemm_bf16 != nullptr && brgemm_release != nullptr && __builtin_cpu_supports("avx512bf16");
}
#else
static void brgemm_bf16(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*,
                        const uint16_t*, float*, bool) {}
static void brgemm_release(bool) {}
static bool supported() { return false; }
#endif

namespace {

// Tile of the result, and the stretch of K packed at a time: b's share is 128 KiB, in L2.
constexpr int64_t kRows = 64, kColumns = 64, kDepth = 1024;

struct Matrix {
  const uint16_t* data;
  int64_t row, column;  // strides

  explicit Matrix(const Tensor& t)
      : data(static_cast<const uint16_t*>(t.data_ptr())), row(t.stride(0)), column(t.stride(1)) {}

  const uint16_t* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Packing moves pairs of bf16 as 32-bit numbers, 16 x 16 of them at a time: one by one it takes as long as the product of
// 64 rows. Only where supported() said yes.
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
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// to[c][r] = from[r][c] for 16 x 16 pairs; strides in bf16.
PACKING void transpose_pairs(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * stride);
  transpose(x);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, x[i]);
}

PACKING __m512i interleave(const uint16_t* first, const uint16_t* second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// to[j] = the pair (first[j], second[j]), 16 of them
PACKING void pair_rows(const uint16_t* first, const uint16_t* second, uint16_t* to) {
  _mm512_storeu_si512(to, interleave(first, second));
}
// to[i][k] = from[k][i] for 32 k and 16 i
PACKING void transpose_rows(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = interleave(from + 2 * i * stride, from + (2 * i + 1) * stride);
  transpose(x);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, x[i]);
}
#else
void transpose_pairs(const uint16_t*, int64_t, uint16_t*, int64_t) {}
void pair_rows(const uint16_t*, const uint16_t*, uint16_t*) {}
void transpose_rows(const uint16_t*, int64_t, uint16_t*, int64_t) {}
#endif

// b[k0:k0+depth, n0:n0+columns] as [depth / 2][columns][2], zero beyond an odd depth.
void pack_pairs(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
                uint16_t* out) {
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
    for (; j < columns; ++j) to[2 * j] = first[j * b.column], to[2 * j + 1] = pair ? second[j * b.column] : 0;
  }
}

// a[m0:m0+rows, k0:k0+depth] row-major with an even leading dimension: in place where it is one.
const uint16_t* row_major(const Matrix& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
                          std::vector<uint16_t>& buffer, int64_t& leading) {
  if (a.column == 1 && depth % 2 == 0) {
    leading = a.row;
    return a.at(m0, k0);
  }
  leading = depth + depth % 2;
  buffer.resize(rows * leading);
  const int64_t blocked = rows / kBlock * kBlock;
  int64_t k = 0;
  if (a.row == 1)  // the transposed gradient of logits
    for (; k + 2 * kBlock <= depth; k += 2 * kBlock)
      for (int64_t i = 0; i < blocked; i += kBlock)
        transpose_rows(a.at(m0 + i, k0 + k), a.column, buffer.data() + i * leading + k, leading);
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* to = buffer.data() + i * leading;
    for (int64_t rest = i < blocked ? k : 0; rest < depth; ++rest) to[rest] = *a.at(m0 + i, k0 + rest);
    if (depth % 2) to[depth] = 0;
  }
  return buffer.data();
}

struct Product {
  Matrix a, b;
  float* out;
  int64_t leading, m, n, k;
  bool accumulate;

  // out[m0:m1, n0:n0+columns] (+)= a[m0:m1, k0:k0+depth] @ packed.
  void tiles(int64_t m0, int64_t m1, int64_t n0, int64_t columns, int64_t k0, int64_t depth,
             const uint16_t* packed, std::vector<uint16_t>& scratch) const {
    for (int64_t i = m0; i < m1; i += kRows) {
      int64_t rows = std::min(kRows, m1 - i), lda;
      const uint16_t* block = row_major(a, i, rows, k0, depth, scratch, lda);
      brgemm_bf16(rows, columns, depth + depth % 2, lda, columns, leading, accumulate || k0 > 0, block,
             packed, out + i * leading + n0, true);
    }
  }

  // Ahead of its turn, a tile of what is added up: hardware does not see it coming.
  void fetch(int64_t m0, int64_t n0, int64_t columns) const {
    for (int64_t i = m0; i < std::min(m, m0 + kRows); ++i)
      for (int64_t line = 0; line < columns; line += 16) __builtin_prefetch(out + i * leading + n0 + line, 1, 2);
  }

  // Wide results: each thread packs its own columns of b and passes all rows of a. Logits are finished a tile at a time;
  // where more is summed over than comes out (the gradient of hidden states), a stretch of a stays in cache instead.
  void by_columns() const {
    torch::stable::parallel_for(0, (n + kColumns - 1) / kColumns, 1, [&](int64_t from, int64_t to) {
      std::vector<uint16_t> packed(kDepth * kColumns), scratch;
      const int64_t end = std::min(n, to * kColumns);
      auto part = [&](int64_t n0, int64_t k0) {
        const int64_t columns = std::min(kColumns, n - n0), depth = std::min(kDepth, k - k0);
        pack_pairs(b, k0, depth, n0, columns, packed.data());
        tiles(0, m, n0, columns, k0, depth, packed.data(), scratch);
      };
      if (k > n) {
        for (int64_t k0 = 0; k0 < k; k0 += kDepth)
          for (int64_t n0 = from * kColumns; n0 < end; n0 += kColumns) part(n0, k0);
      } else {
        for (int64_t n0 = from * kColumns; n0 < end; n0 += kColumns)
          for (int64_t k0 = 0; k0 < k; k0 += kDepth) part(n0, k0);
      }
      brgemm_release(true);
    });
  }

  // Tall results (weight gradients): b is packed once for all, each thread takes rows of a. The
  // result is passed over once per kDepth tokens, while its tile is in cache.
  void by_rows() const {
    int64_t blocks = (n + kColumns - 1) / kColumns;
    std::vector<uint16_t> packed(blocks * kDepth * kColumns);
    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      int64_t depth = std::min(kDepth, k - k0);
      const bool adds = accumulate || k0 > 0;
      auto columns = [&](int64_t block) { return std::min(kColumns, n - block * kColumns); };
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
        for (int64_t block = from; block < to; ++block)
          pack_pairs(b, k0, depth, block * kColumns, columns(block),
                     packed.data() + block * kDepth * kColumns);
      });
      torch::stable::parallel_for(0, (m + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
        std::vector<uint16_t> scratch;
        for (int64_t i = from * kRows; i < std::min(m, to * kRows); i += kRows) {
          int64_t rows = std::min(kRows, m - i), lda;
          const uint16_t* block_a = row_major(a, i, rows, k0, depth, scratch, lda);
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kColumns;
            if (adds) fetch(i + rows, first, columns(block));
            brgemm_bf16(rows, columns(block), depth + depth % 2, lda, columns(block), leading,
                        adds, block_a, packed.data() + block * kDepth * kColumns, out + i * leading + first, true);
          }
        }
        brgemm_release(true);
      });
    }
  }
};

}  // namespace

// Whether matmul() works on this machine.
bool matmul_supported() { return supported(); }

// out (m, n) fp32 with unit column stride; a (m, k) and b (k, n) bf16 with any strides.
void matmul(Tensor out, Tensor a, Tensor b, bool accumulate) {
  STD_TORCH_CHECK(supported() && a.scalar_type() == ScalarType::BFloat16,
                  "matmul: needs bf16 operands and AVX512-BF16");
  Product product{Matrix(a),     Matrix(b), static_cast<float*>(out.data_ptr()),
                  out.stride(0), a.size(0), b.size(1),
                  a.size(1),     accumulate};
  product.n >= product.m ? product.by_columns() : product.by_rows();
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("matmul_supported() -> bool");
  m.def("matmul(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("matmul_supported", TORCH_BOX(&matmul_supported));
  m.impl("matmul", TORCH_BOX(&matmul));
}
