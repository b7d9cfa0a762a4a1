// The CUDA ops of the losses: launch on torch's current stream. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/check.h"
#include "ops/loss_calls.h"
#include "ops/losses.h"
#include "ops/tensors.h"
#include "kernels/cuda/kernels.h"

namespace dlk {
namespace {

using at::Reduction::Reduction;

at::Tensor scratch(const at::Tensor& like) {
  return at::empty({cuda::kLossScratch}, like.options().dtype(at::kDouble));
}

at::Tensor scalar(Reduction reduction, const at::Tensor& like) {
  return reduction == at::Reduction::None ? at::Tensor() : at::empty({}, like.options());
}

LossAndGrads elementwise_loss(const char* op, const at::Tensor& input, const at::Tensor& target, const at::Tensor& var,
                              double eps, double constant, int64_t reduction, bool need_input, bool need_var) {
  const auto call = call_elementwise_loss(op, input, target, var, eps, constant, reduction, need_input, need_var);
  const c10::cuda::CUDAGuard device(input.device());
  const at::Tensor sums = scratch(input), total = scalar(call.reduction, input);
  cuda::ElementwiseLoss p{call.p, call.dtype, data_or_null(total)};
  p.sums = sums.data_ptr<double>();
  C10_CUDA_CHECK((var.defined() ? cuda::gaussian_nll : cuda::squared_error)(p, c10::cuda::getCurrentCUDAStream()));
  return {total.defined() ? total : call.each, call.grad_input, call.grad_var};
}

}  // namespace

LossAndGrad mse_loss_cuda(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool need_grad) {
  const auto [loss, grad, _] = elementwise_loss("mse_loss", input, target, {}, 0, 0, reduction, need_grad, false);
  return {loss, grad};
}

LossAndGrads gaussian_nll_loss_cuda(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                                    double eps, int64_t reduction, bool need_input, bool need_var) {
  return elementwise_loss("gaussian_nll_loss", input, target, var, eps, gaussian_constant(full), reduction, need_input,
                          need_var);
}

LossAndGrads cross_entropy_cuda(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_input,
                                bool need_target) {
  const auto call =
      call_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, need_input, need_target);
  const c10::cuda::CUDAGuard device(input.device());
  const at::Tensor sums = scratch(input), total = scalar(call.reduction, input);
  const bool mean = call.reduction == at::Reduction::Mean;
  cuda::CrossEntropy p{call.p, call.dtype, mean, data_or_null(total)};
  p.sums = sums.data_ptr<double>();
  if (mean) p.scale = 1 / call.rows;
  C10_CUDA_CHECK(cuda::cross_entropy(p, c10::cuda::getCurrentCUDAStream()));
  return {total.defined() ? total : call.each, call.grad, call.grad_target};
}

}  // namespace dlk
