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
at::Tensor zeros_like(const at::Tensor& a);
at::Tensor arange(int64_t end, const at::TensorOptions& options);
at::Tensor threshold(const at::Tensor& a, double limit);  // a where it is above limit, else 0
// g · act'(s), where s is y of tanh and sigmoid; threshold_backward is of relu.
at::Tensor threshold_backward(const at::Tensor& g, const at::Tensor& s);
at::Tensor leaky_relu_backward(const at::Tensor& g, const at::Tensor& y, double slope);
at::Tensor gelu_tanh_backward(const at::Tensor& g, const at::Tensor& z);
at::Tensor tanh_backward(const at::Tensor& g, const at::Tensor& y);
at::Tensor sigmoid_backward(const at::Tensor& g, const at::Tensor& y);
at::Tensor stack(at::TensorList tensors);
at::Tensor cat(at::TensorList tensors);

at::Tensor mm(const at::Tensor& a, const at::Tensor& b);
at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b);

}  // namespace dlk::aten
