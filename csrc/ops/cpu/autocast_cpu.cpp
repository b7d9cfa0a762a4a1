// The CPU ops of one layer under autocast: check, allocate, compute.
#include <ATen/ops/empty.h>

#include "ops/linear_act.h"
#include "ops/cpu/layer.h"
#include "planning/cpu/route.h"

namespace dlk {
namespace {

const cpu::AutocastLayer& kernels_for(at::ScalarType x) {
  TORCH_CHECK_NOT_IMPLEMENTED(cpu::autocast_kernels(),
                              "linear_act: no products of bfloat16 on this CPU; cast x, weight and bias first");
  const cpu::Autocast& autocast = cpu::kernels().autocast;
  return x == at::kFloat ? autocast.f32_x : autocast.bf16_x;
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act, double slope,
                   at::Tensor* z) {
  const Problem c = check_forward(x, weight, bias, act, slope, Dtypes::autocast);
  const auto options = x.options().dtype(at::kBFloat16);
  at::Tensor y = at::empty(resized_last(x, c.shape.n), options);
  if (z) *z = at::empty(y.sizes(), options);
  cpu::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), y, z, &kernels_for(x.scalar_type()));
  return y;
}

}  // namespace

at::Tensor linear_act_autocast_forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                           int64_t act, double slope) {
  return forward(x, weight, bias, act, slope, nullptr);
}

std::tuple<at::Tensor, at::Tensor> linear_act_autocast_forward_z_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                                     const OptionalTensor& bias, int64_t act,
                                                                     double slope) {
  at::Tensor z;
  at::Tensor y = forward(x, weight, bias, act, slope, &z);
  return {y, z};
}

Gradients linear_act_autocast_backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x,
                                           const OptionalTensor& weight, const at::Tensor& saved,
                                           at::ScalarType x_dtype, int64_t act, double slope, bool need_x,
                                           bool need_weight, bool need_bias) {
  const Problem c =
      check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight, Dtypes::autocast, x_dtype);
  Gradients made = new_gradients(c.shape, grad_y, x_dtype, at::kFloat, need_x, need_weight, need_bias);
  cpu::layer_backward(c, {grad_y, saved}, x.value_or(at::Tensor()), weight.value_or(at::Tensor()), made, nullptr,
                      &kernels_for(x_dtype));
  return made;
}

}  // namespace dlk
