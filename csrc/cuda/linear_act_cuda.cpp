// The CUDA ops: check, then run on torch's current stream.
#include "../linear_act.h"

#include <c10/cuda/CUDAGuard.h>

#include "layer.h"

namespace dlk {

at::Tensor linear_act_forward_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  cuda::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), y, nullptr);
  return y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                             const OptionalTensor& bias, int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor z = at::empty(y.sizes(), x.options());
  cuda::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), y, &z);
  return {y, z};
}

Gradients linear_act_backward_cuda(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                   const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                   bool need_bias) {
  const Checked c = check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight);
  const c10::cuda::CUDAGuard device(grad_y.device());
  const at::Tensor none;
  const Incoming in = {grad_y, c.act.kind == Act::none ? none : saved};
  return cuda::layer_backward(c, in, x.value_or(none), weight.value_or(none), need_x, need_weight, need_bias);
}

}  // namespace dlk
