// The CUDA ops of the losses: launch on torch's current stream. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace dlk::cuda {
namespace {

using at::Reduction::Reduction;

at::Tensor scratch(const at::Tensor& like) { return at::empty({kLossScratch}, like.options().dtype(at::kDouble)); }

at::Tensor scalar(Reduction reduction, const at::Tensor& like) {
  return reduction == at::Reduction::None ? at::Tensor() : at::empty({}, like.options());
}

}  // namespace

at::Tensor elementwise_loss(const ElementwiseLossCall& call) {
  const at::Tensor& input = call.operands[0];
  const at::Tensor sums = scratch(input), total = scalar(call.reduction, input);
  ElementwiseLoss p{call.p, call.dtype, data_or_null(total)};
  p.sums = sums.data_ptr<double>();
  C10_CUDA_CHECK((call.has_var ? gaussian_nll : squared_error)(p, c10::cuda::getCurrentCUDAStream()));
  return total.defined() ? total : call.each;
}

at::Tensor cross_entropy(const CrossEntropyCall& call) {
  const at::Tensor sums = scratch(call.x), total = scalar(call.reduction, call.x);
  const bool mean = call.reduction == at::Reduction::Mean;
  CrossEntropy p{call.p, call.dtype, mean, data_or_null(total)};
  p.sums = sums.data_ptr<double>();
  if (mean) p.scale = 1 / call.rows;
  C10_CUDA_CHECK(cross_entropy(p, c10::cuda::getCurrentCUDAStream()));
  return total.defined() ? total : call.each;
}

}  // namespace dlk::cuda
