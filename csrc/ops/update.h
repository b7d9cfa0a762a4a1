// One step of torch's optimizers Adam, AdamW and SGD for the parameters of a group.
#pragma once

#include <vector>

#include "kernels/cpu/kernels.h"
#include "ops/tensors.h"

namespace dlk {

// The parameters of a group that have a gradient, and their state. All tensors are contiguous; the state has the shapes and
// dtypes of the parameters.
struct OptimizerGroup {
  cpu::UpdateRule rule;
  bool amsgrad, maximize, nesterov;
  double lr, weight_decay, beta2, eps, dampening;
  double beta1;  // of sgd the factor of the momentum
  std::vector<at::Tensor> parameters;
  std::vector<at::Tensor> means;        // exp_avg; of sgd the momenta, none if beta1 is 0
  std::vector<at::Tensor> squares;      // exp_avg_sq; adam and adamw
  std::vector<at::Tensor> max_squares;  // max_exp_avg_sq; amsgrad
  std::vector<at::Tensor> steps;        // of 0 dimensions, float32 or float64; adam and adamw
  at::Tensor lr_on_gpu;  // of one float32, in place of `lr` where it is defined: a CUDA graph reads it at each replay
  int64_t members = 1;   // of an ensemble, whose tensors are stacked: each has the bits of the member alone
};

// The same by torch's kernels alone, for steps that are counted already.
void update_by_torch(const OptimizerGroup&, at::TensorList grads);

// Update the parameters and the state as torch does with fused=True, to the bit: by our kernel where it has the bits of
// torch's, which is tried once per process, dtype and rule, else by torch's.
void update(const OptimizerGroup&, at::TensorList grads);

// Return true if our kernel makes this update, to the bit, and no mode has to see torch's. Any part of the parameters may then
// be updated before the others, by `part_of`.
bool updates_by_kernel(const OptimizerGroup&);
OptimizerGroup part_of(const OptimizerGroup&, at::ArrayRef<size_t> places);

namespace cpu {

// Update by our kernel, for steps that are counted already. Return false, and do nothing, where there is none for this dtype.
bool update_by_kernel(const OptimizerGroup&, at::TensorList grads);

// Return true if our kernel has the bits of torch's.
bool updates_like_torch(at::ScalarType, UpdateRule);

}  // namespace cpu
}  // namespace dlk
