// The CUDA ops: check, then run on torch's current stream.
#include "ops/linear_act.h"

#include <c10/cuda/CUDAGuard.h>

#include "ops/cuda/layer.h"

namespace dlk {
namespace {

void check_mask(const Problem& c) {
  TORCH_CHECK(cuda::takes_mask(c),
              "linear_act: a mask is of relu or leaky_relu, in bfloat16 or float16, with a multiple of ", kMaskBits,
              " out_features; got activation code ", static_cast<int>(c.act.kind), " and ", c.shape.n, " out_features");
}

}  // namespace

at::Tensor linear_act_forward_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  cuda::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), {y});
  return y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                             const OptionalTensor& bias, int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor z = at::empty(y.sizes(), x.options());
  cuda::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), {y, z});
  return {y, z};
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_mask_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                                const OptionalTensor& bias, int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  check_mask(c);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor mask = at::empty(resized_last(x, c.shape.n / kMaskBits), x.options().dtype(at::kByte));
  cuda::layer_forward(c, x, weight, bias ? bias->contiguous() : at::Tensor(), {y, {}, mask});
  return {y, mask};
}

Gradients linear_act_backward_cuda(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                   const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                   bool need_bias) {
  const bool is_mask = cuda::is_mask(saved);  // grad_y stands in for the y that it stands for
  const Problem c = check_backward(grad_y, x, weight, is_mask ? grad_y : saved, act, slope, need_x, need_weight);
  if (is_mask) {
    check_mask(c);
    check_place(saved, "the mask", grad_y, "grad_y", "linear_act");
    const std::vector<int64_t> sizes = resized_last(grad_y, c.shape.n / kMaskBits);
    TORCH_CHECK(saved.sizes() == at::IntArrayRef(sizes), "linear_act: expected the mask of grad_y ", grad_y.sizes(),
                " to be ", at::IntArrayRef(sizes), ", got ", saved.sizes());
  }
  const c10::cuda::CUDAGuard device(grad_y.device());
  const at::Tensor none;
  const OutputGrad in = {grad_y, c.act.kind == Act::none ? none : saved};
  return cuda::layer_backward(c, in, x.value_or(none), weight.value_or(none), need_x, need_weight, need_bias);
}

}  // namespace dlk
