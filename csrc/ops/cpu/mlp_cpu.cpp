// The CPU ops of a chain of layers. Narrow layers and many rows go through the chain kernels, rows in cache from the
// first layer to the last; others run layer by layer, where each dgrad applies the mask of the layer below.
#include "ops/mlp_host.h"
#include "ops/cpu/layer.h"
#include "planning/cpu/route.h"

namespace dlk {
namespace {

using cpu::kernel_table;

int slices_of(const FusedMlp& p, DType dtype) {
  std::vector<Shape> shapes;
  for (int l = 0; l < p.layers; ++l) shapes.push_back({p.rows, p.layer[l].n, p.layer[l].k});
  return cpu::fused_mlp_slices(shapes, dtype);
}

cpu::Parallel parallel_for(const FusedMlp& p) {
  int64_t multiplications = 0;
  for (int l = 0; l < p.layers; ++l) multiplications += p.rows * p.layer[l].n * p.layer[l].k;
  return cpu::parallel_for_work(multiplications);
}

const MlpKernels kKernels = {
    [](const FusedMlp& p, DType dtype) { return slices_of(p, dtype) > 0; },
    [](const FusedMlp& p, DType dtype) { kernel_table(dtype).fused_mlp_forward(p, parallel_for(p)); },
    [](FusedMlp p, DType dtype, const at::Tensor& like) {
      p.slices = slices_of(p, dtype);
      const at::Tensor partials = accumulators(p.slices * cpu::fused_mlp_parameters(p), like);
      p.partials = partials.data_ptr();
      kernel_table(dtype).fused_mlp_backward(p, parallel_for(p));
    },
    &cpu::layer_forward,
    &cpu::layer_backward,
    /*dgrad_sums_dbias=*/false,
    /*takes_mask=*/[](const Problem&) { return false; },
};

}  // namespace

std::vector<at::Tensor> mlp_forward_cpu(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                        at::IntArrayRef acts, double slope, at::IntArrayRef keep) {
  return mlp_forward(kKernels, x, weights, biases, acts, slope, keep);
}

std::vector<at::Tensor> mlp_backward_cpu(const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                                         const OptionalTensors& weights, const std::optional<at::Tensor>& y,
                                         at::TensorList kept, at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                         at::IntArrayRef needs) {
  return mlp_backward(kKernels, grad_y, x, weights, y, kept, keep, acts, slope, needs);
}

}  // namespace dlk
