// torch's operators that these files call. <ATen/ops/...> would declare them too, but each header there costs a compiler 1.7 s
// and 250 MB.
#pragma once

#include <ATen/core/Tensor.h>

namespace dlk::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor scalar_tensor(const at::Scalar& value, const at::TensorOptions& options);

at::Tensor mul(const at::Tensor& a, const at::Tensor& b);
at::Tensor neg(const at::Tensor& a);
at::Tensor stack(at::TensorList tensors);

at::Tensor mm(const at::Tensor& a, const at::Tensor& b);
at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b);

}  // namespace dlk::aten
