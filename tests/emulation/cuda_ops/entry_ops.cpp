// The CUDA ops in the CPU ops' place: what is registered last counts.
#include <torch/library.h>

#include "cuda_runtime.h"
#include "ops/linear_act.h"
#include "ops/losses.h"
#include "ops/mlp.h"

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("_linear_act_forward", &dlk::linear_act_forward_cuda);
  m.impl("_linear_act_forward_z", &dlk::linear_act_forward_z_cuda);
  m.impl("_linear_act_forward_mask", &dlk::linear_act_forward_mask_cuda);
  m.impl("_linear_act_backward", &dlk::linear_act_backward_cuda);
  m.impl("_mlp_forward", &dlk::mlp_forward_cuda);
  m.impl("_mlp_backward", &dlk::mlp_backward_cuda);
  m.impl("_mse_loss", &dlk::mse_loss_cuda);
  m.impl("_gaussian_nll_loss", &dlk::gaussian_nll_loss_cuda);
  m.impl("_cross_entropy", &dlk::cross_entropy_cuda);
  m.impl("_linear_cross_entropy", &dlk::linear_cross_entropy_cuda);
}

// Kernels launched so far.
extern "C" int64_t launches() { return cuda_emulation::launches; }
