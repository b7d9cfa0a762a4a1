#include "ops/aten.h"

#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/scalar_tensor_ops.h>
#include <ATen/ops/stack_ops.h>
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

at::Tensor stack(at::TensorList tensors) { return at::_ops::stack::call(tensors, 0); }

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) { return at::_ops::mm::call(a, b); }

at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return at::_ops::mm_out::call(a, b, out);
}

at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b) {
  return at::_ops::addmm_out::call(bias, a, b, 1, 1, out);
}

}  // namespace dlk::aten
