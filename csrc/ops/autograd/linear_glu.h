// linear_glu with its gradients.
#pragma once

#include "ops/tensors.h"

namespace dlk {

// act(x · weight_gateᵀ + bias_gate) · (x · weight_upᵀ + bias_up)
at::Tensor linear_glu(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                      const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope);

}  // namespace dlk
