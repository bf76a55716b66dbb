// torch.ops.fusedkd_cpu: rows of logits without a teacher. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "tensors.h"

namespace fusedkd {
namespace {

// What both operators are told; `numbers`: temperature, scale, softcap; `part`: where the columns
// begin in the vocabulary, and how many of them there are.
SoftmaxCall call_of(const Tensor& logits, const Tensor& counts, const Tensor& ids,
                    const std::vector<double>& numbers, const std::vector<int64_t>& part,
                    const Tensor& statistics) {
  STD_TORCH_CHECK(numbers.size() == 3 && part.size() == 2,
                  "fusedkd_cpu: wrong number of parameters");
  SoftmaxCall call{};
  call.logits = logits_of(logits, numbers[1], numbers[2]);
  call.temperature = numbers[0];
  call.batch = logits.size(0), call.tokens = logits.size(1);
  call.offset = part[0], call.columns = part[1];
  const int64_t rows = call.batch * call.tokens;
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && ids.dim() == 2 &&
                      ids.size(0) == rows && counts.numel() == rows &&
                      counts.scalar_type() == ScalarType::Bool && counts.is_contiguous() &&
                      call.columns >= 0 && call.columns <= logits.size(2),
                  "fusedkd_cpu: shapes of logits, counts and ids do not match");
  call.entries = ids.size(1);
  STD_TORCH_CHECK(dtype_of(statistics) == DType::f64 && statistics.is_contiguous() &&
                      statistics.numel() == rows * (kSoftmaxFields + call.entries),
                  "fusedkd_cpu: statistics have another shape than they should");
  call.counts = pointer<bool>(counts), call.ids = pointer<int64_t>(ids);
  call.statistics = pointer<double>(statistics);
  return call;
}

void token_statistics(Tensor logits, Tensor counts, Tensor ids, std::vector<double> numbers,
                      std::vector<int64_t> part, bool entropy, Tensor statistics) {
  SoftmaxCall call = call_of(logits, counts, ids, numbers, part, statistics);
  call.entropy = entropy;
  for_rows(call.batch * call.tokens, call.columns,
           [&](int64_t row, int64_t) { instructions().softmax(call, row); });
}

void token_gradient(Tensor logits, Tensor counts, Tensor ids, std::vector<double> numbers,
                    std::vector<int64_t> part, Tensor statistics, Tensor constant,
                    std::optional<Tensor> linear, Tensor grad) {
  SoftmaxCall call = call_of(logits, counts, ids, numbers, part, statistics);
  const int64_t rows = call.batch * call.tokens;
  STD_TORCH_CHECK(constant.numel() == rows && dtype_of(constant) == DType::f64 &&
                      (!linear || (linear->numel() == rows && dtype_of(*linear) == DType::f64)) &&
                      grad.size(0) == call.batch && grad.size(1) == call.tokens &&
                      grad.size(2) >= call.columns,
                  "fusedkd_cpu: factors or grad have another shape than they should");
  call.constant = pointer<double>(constant);
  call.linear = linear ? pointer<double>(*linear) : nullptr;
  call.grad = logits_of(grad, 1, 0), call.grad_columns = grad.size(2);
  call.stream = call.grad.data != call.logits.data &&
                rows * call.columns * static_cast<int64_t>(grad.element_size()) >= kStreamBytes;
  for_rows(rows, call.columns, [&](int64_t row, int64_t) { instructions().softmax(call, row); });
}

void top(Tensor logits, Tensor counts, Tensor ids, std::vector<double> numbers,
         std::vector<int64_t> part, Tensor statistics, Tensor top_values, Tensor top_ids) {
  TopCall call{};
  static_cast<SoftmaxCall&>(call) = call_of(logits, counts, ids, numbers, part, statistics);
  call.k = top_ids.size(1);
  const int64_t rows = call.batch * call.tokens;
  STD_TORCH_CHECK(top_ids.size(0) == rows && top_ids.scalar_type() == ScalarType::Long &&
                      dtype_of(top_values) == DType::f64 && top_values.numel() == rows * call.k,
                  "fusedkd_cpu: the top's values and ids have another shape than they should");
  call.top_values = pointer<double>(top_values), call.top_ids = pointer<int64_t>(top_ids);
  for_rows(rows, call.columns, [&](int64_t row, int64_t) { instructions().top(call, row); });
}

}  // namespace
}  // namespace fusedkd

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def(
      "token_statistics(Tensor logits, Tensor counts, Tensor ids, float[] numbers, int[] part, "
      "bool entropy, Tensor(a!) statistics) -> ()");
  m.def(
      "token_gradient(Tensor logits, Tensor counts, Tensor ids, float[] numbers, int[] part, "
      "Tensor statistics, Tensor constant, Tensor? linear, Tensor(a!) grad) -> ()");
  m.def(
      "top(Tensor logits, Tensor counts, Tensor ids, float[] numbers, int[] part, Tensor(a!) "
      "statistics, Tensor(b!) top_values, Tensor(c!) top_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) {
  m.impl("token_statistics", TORCH_BOX(&fusedkd::token_statistics));
  m.impl("token_gradient", TORCH_BOX(&fusedkd::token_gradient));
  m.impl("top", TORCH_BOX(&fusedkd::top));
}
