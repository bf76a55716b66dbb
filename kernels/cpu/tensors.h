// What the files of operators ask of tensors, of the machine and of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>

#include "kernel.h"

namespace fusedkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fake and meta tensors have none.
template <class T = void> inline T* pointer(const Tensor& t) {
  void* data = t.data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, "fusedkd_cpu: got a tensor without memory");
  return static_cast<T*>(data);
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fusedkd_cpu: expected float64, float32, bfloat16 or float16");
  }
  return DType::f32;
}

inline Logits logits_of(const Tensor& t, double scale, double softcap) {
  STD_TORCH_CHECK(
      t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1),
      "fusedkd_cpu: expected (batch, tokens, columns) with unit stride in the last dimension");
  return {pointer(t), t.stride(0), t.stride(1), dtype_of(t), scale, softcap};
}

// Gradients of at least this many bytes are written past the caches: they would not stay there
// anyhow.
constexpr int64_t kStreamBytes = 16 << 20;

// Of the machine, or as FUSEDKD_CPU_ISA has it.
const InstructionSet& instructions();

// Work for one thread below which a second one does not pay, in vocabulary entries.
constexpr int64_t kGrain = 32768;
// Calls `one(row, next)` for each row; `next` is what the same thread does then, or -1. Which
// thread does a row does not matter to its result, so threads take the next one when they are free:
// rows that do not count cost nothing, and neighbours on the machine disturb less.
template <class One> void for_rows(int64_t rows, int64_t columns, const One& one) {
  if (rows == 0) return;
  const int64_t workers =
      std::min<int64_t>({torch::stable::get_num_threads(), rows, rows * columns / kGrain + 1});
  const int64_t batch = std::max<int64_t>(
      1, std::min(kGrain / 2 / std::max<int64_t>(columns, 1), rows / workers / 4));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto claim = [&] { return next.fetch_add(batch, std::memory_order_relaxed); };
    for (int64_t from = claim(), then; from < rows; from = then) {
      then = claim();
      const int64_t last = std::min(rows, from + batch) - 1;
      for (int64_t row = from; row < last; ++row) one(row, row + 1);
      one(last, then < rows ? then : -1);
    }
  });
}

}  // namespace fusedkd
