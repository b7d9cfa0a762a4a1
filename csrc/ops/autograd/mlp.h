// mlp with its gradients.
#pragma once

#include "ops/mlp.h"

namespace dlk {

// The chain of layers h[l+1] = act_l(h[l] · weight_lᵀ + bias_l).
at::Tensor mlp(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
               double slope);

}  // namespace dlk
