// The CUDA ops of a chain of layers. Narrow layers go through the chain kernels, which hold their weights in shared
// memory; others run layer by layer, where each dgrad applies the mask of the layer below and sums its dbias.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/mlp_host.h"
#include "kernels/cuda/kernels.h"
#include "ops/cuda/layer.h"

namespace dlk {
namespace {

const MlpKernels kKernels = {
    &cuda::fused_mlp_takes,
    [](const FusedMlp& p, DType dtype) {
      C10_CUDA_CHECK(cuda::fused_mlp_forward(p, dtype, c10::cuda::getCurrentCUDAStream()));
    },
    &cuda::run_fused_mlp_backward,
    &cuda::layer_forward,
    &cuda::layer_backward,
    /*dgrad_sums_dbias=*/true,
    &cuda::takes_mask,
};

}  // namespace

std::vector<at::Tensor> mlp_forward_cuda(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         at::IntArrayRef acts, double slope, at::IntArrayRef keep) {
  return mlp_forward(kKernels, x, weights, biases, acts, slope, keep);
}

std::vector<at::Tensor> mlp_backward_cuda(const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                                          const OptionalTensors& weights, const std::optional<at::Tensor>& y,
                                          at::TensorList kept, at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                          at::IntArrayRef needs) {
  return mlp_backward(kKernels, grad_y, x, weights, y, kept, keep, acts, slope, needs);
}

}  // namespace dlk
