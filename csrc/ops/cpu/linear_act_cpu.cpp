// The CPU ops of one layer: check, allocate, compute.
#include "ops/linear_act.h"

#include <ATen/ops/empty.h>

#include "ops/cpu/layer.h"

namespace dlk {
namespace {

at::Tensor contiguous_or_none(const OptionalTensor& t) { return t ? t->contiguous() : at::Tensor(); }

}  // namespace

at::Tensor linear_act_forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                  int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  cpu::layer_forward(c, x, weight, contiguous_or_none(bias), {y});
  return y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                            const OptionalTensor& bias, int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor z = at::empty(y.sizes(), x.options());
  cpu::layer_forward(c, x, weight, contiguous_or_none(bias), {y, z});
  return {y, z};
}

Gradients linear_act_backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                  const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                  bool need_bias) {
  const Problem c = check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight);
  return cpu::layer_backward(c, {grad_y, saved}, x.value_or(at::Tensor()), weight.value_or(at::Tensor()), need_x,
                             need_weight, need_bias);
}

}  // namespace dlk
