// What becomes of gradients: their memory, and their factor from above.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "memory.h"
#include "tensors.h"

namespace fusedkd {
namespace {

// Rows of a (batch, tokens, columns) tensor with unit last stride, or of any contiguous one; `out`
// is the same tensor, or contiguous.
void scale_(Tensor out, Tensor data, Tensor factor) {
  const bool per_row = factor.dim() > 0;
  const int64_t all = data.numel();
  STD_TORCH_CHECK(out.numel() == all && (out.data_ptr() == data.data_ptr() || out.is_contiguous()),
                  "fusedkd_cpu::scale_: expected a contiguous output of as many entries");
  if (all == 0) return;
  ScaleCall call{};
  call.data = pointer(data), call.out = pointer(out), call.inner_rows = 1;
  call.per_row = per_row, call.dtype = dtype_of(data), call.out_dtype = dtype_of(out);
  if (data.dim() == 3 && !data.is_contiguous()) {
    call.rows = data.size(0) * data.size(1), call.columns = data.size(2);
    call.inner_rows = data.size(1), call.stride_outer = data.stride(0),
    call.stride_inner = data.stride(1);
  } else {
    STD_TORCH_CHECK(data.is_contiguous(), "fusedkd_cpu::scale_: expected a contiguous tensor");
    // with a single factor, rows are only what threads share
    call.rows = per_row ? factor.numel() : (all + kGrain - 1) / kGrain;
    call.columns = per_row ? all / factor.numel() : kGrain;
    call.stride_outer = call.columns;
  }
  call.out_stride = call.columns;
  std::vector<double> factors(factor.numel());
  const void* numbers = pointer(factor);
  for (size_t i = 0; i < factors.size(); ++i)
    factors[i] = dtype_of(factor) == DType::f64 ? static_cast<const double*>(numbers)[i]
                                                : static_cast<const float*>(numbers)[i];
  STD_TORCH_CHECK(!per_row || static_cast<int64_t>(factors.size()) == call.rows,
                  "fusedkd_cpu::scale_: expected one factor, or one per row");
  if (!per_row && factors[0] == 1 && call.out == call.data) return;
  call.factors = factors.data();
  const bool flat = !per_row && data.is_contiguous();
  for_rows(call.rows, call.columns, [&](int64_t row, int64_t) {
    ScaleCall part = call;
    if (flat) part.columns = std::min(kGrain, all - row * kGrain);
    instructions().scale(part, row);
  });
}

// Uninitialised and contiguous, on the CPU; see Spare.
Tensor spare(std::vector<int64_t> shape, ScalarType dtype, int64_t bytes) {
  const Spare::Block block = Spare::instance().take(bytes);
  STD_TORCH_CHECK(block.data != nullptr, "fusedkd_cpu: cannot allocate memory: ", bytes,
                  " bytes were asked for");
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(block.data, shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) { Spare::instance().give(block); });
}

}  // namespace
}  // namespace fusedkd

STABLE_TORCH_LIBRARY_FRAGMENT(fusedkd_cpu, m) {
  m.def("scale_(Tensor(a!) out, Tensor data, Tensor factor) -> ()");
  m.def("spare(int[] shape, ScalarType dtype, int bytes) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CompositeExplicitAutograd, m) {
  m.impl("spare", TORCH_BOX(&fusedkd::spare));
}
STABLE_TORCH_LIBRARY_IMPL(fusedkd_cpu, CPU, m) { m.impl("scale_", TORCH_BOX(&fusedkd::scale_)); }
