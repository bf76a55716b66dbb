// What both files of operators ask of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fusedkd {

// Fake and meta tensors have none.
template <class T = void> inline T* pointer(const torch::stable::Tensor& t) {
  void* data = t.data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, "fusedkd_cpu: got a tensor without memory");
  return static_cast<T*>(data);
}

}  // namespace fusedkd
