// linear_act with its gradients.
#pragma once

#include "ops/tensors.h"

namespace dlk {

// act(x · weightᵀ + bias). `mask`: a mask of y is saved in y's place (dlkernels/_ops/masks.py decides).
at::Tensor linear_act(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                      double slope, bool mask);

// The same for a layer that casts inside, under bf16 autocast on CPU; see ops/linear_act.h.
at::Tensor linear_act_autocast(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                               double slope);

}  // namespace dlk
