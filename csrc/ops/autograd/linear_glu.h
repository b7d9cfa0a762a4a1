// linear_glu with its gradients.
#pragma once

#include "ops/tensors.h"

namespace dlk {

// act(x · weight_gateᵀ + bias_gate) · (x · weight_upᵀ + bias_up)
at::Tensor linear_glu(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                      const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope);

// The same with the rows of both weights in one, weight [2N, K], and both biases in one, bias [2N]; the gate's first or last.
at::Tensor linear_glu_packed(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                             double slope, bool gate_first);

}  // namespace dlk
