#include "ops/aten.h"

#include <ATen/core/IListRef.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/arange_ops.h>
#include <ATen/ops/cat_ops.h>
#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/ops/gelu_backward_ops.h>
#include <ATen/ops/leaky_relu_backward_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/scalar_tensor_ops.h>
#include <ATen/ops/sigmoid_backward_ops.h>
#include <ATen/ops/stack_ops.h>
#include <ATen/ops/tanh_backward_ops.h>
#include <ATen/ops/threshold_backward_ops.h>
#include <ATen/ops/threshold_ops.h>
#include <ATen/ops/zeros_like_ops.h>
#include <ATen/ops/zeros_ops.h>

namespace dlk::aten {
namespace {

std::optional<at::ScalarType> dtype_of(const at::TensorOptions& options) {
  return c10::optTypeMetaToScalarType(options.dtype_opt());
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::_ops::empty_memory_format::call(c10::fromIntArrayRefSlow(sizes), dtype_of(options), options.layout_opt(),
                                             options.device_opt(), options.pinned_memory_opt(),
                                             options.memory_format_opt());
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  return at::_ops::empty_strided::call(c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(strides),
                                       dtype_of(options), options.layout_opt(), options.device_opt(),
                                       options.pinned_memory_opt());
}

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::_ops::zeros::call(c10::fromIntArrayRefSlow(sizes), dtype_of(options), options.layout_opt(),
                               options.device_opt(), options.pinned_memory_opt());
}

at::Tensor scalar_tensor(const at::Scalar& value, const at::TensorOptions& options) {
  return at::_ops::scalar_tensor::call(value, dtype_of(options), options.layout_opt(), options.device_opt(),
                                       options.pinned_memory_opt());
}

at::Tensor mul(const at::Tensor& a, const at::Tensor& b) { return at::_ops::mul_Tensor::call(a, b); }
at::Tensor neg(const at::Tensor& a) { return at::_ops::neg::call(a); }
at::Tensor zeros_like(const at::Tensor& a) { return at::_ops::zeros_like::call(a, {}, {}, {}, {}, {}); }

at::Tensor arange(int64_t end, const at::TensorOptions& options) {
  return at::_ops::arange::call(end, dtype_of(options), options.layout_opt(), options.device_opt(),
                                options.pinned_memory_opt());
}

at::Tensor threshold(const at::Tensor& a, double limit) { return at::_ops::threshold::call(a, limit, 0); }
at::Tensor threshold_backward(const at::Tensor& g, const at::Tensor& s) {
  return at::_ops::threshold_backward::call(g, s, 0);
}
at::Tensor leaky_relu_backward(const at::Tensor& g, const at::Tensor& y, double slope) {
  return at::_ops::leaky_relu_backward::call(g, y, slope, /*self_is_result=*/true);
}
at::Tensor gelu_tanh_backward(const at::Tensor& g, const at::Tensor& z) {
  return at::_ops::gelu_backward::call(g, z, "tanh");
}
at::Tensor tanh_backward(const at::Tensor& g, const at::Tensor& y) { return at::_ops::tanh_backward::call(g, y); }
at::Tensor sigmoid_backward(const at::Tensor& g, const at::Tensor& y) { return at::_ops::sigmoid_backward::call(g, y); }

at::Tensor stack(at::TensorList tensors) { return at::_ops::stack::call(tensors, 0); }

at::Tensor cat(at::TensorList tensors) { return at::_ops::cat::call(at::ITensorListRef(tensors), 0); }

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) { return at::_ops::mm::call(a, b); }

at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return at::_ops::mm_out::call(a, b, out);
}

at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b) {
  return at::_ops::addmm_out::call(bias, a, b, 1, 1, out);
}

}  // namespace dlk::aten
