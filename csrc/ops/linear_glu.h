// A gated layer, y = act(gate) · up with gate = x · weight_gateᵀ + bias_gate and up = x · weight_upᵀ + bias_up, and its
// gradients, for every device. x [..., K], weights [N, K], biases [N] or None; y, gate and up [..., N].
#pragma once

#include "ops/device.h"

namespace dlk {

at::Tensor linear_glu_forward(const Device&, const at::Tensor& x, const at::Tensor& weight_gate,
                              const at::Tensor& weight_up, const OptionalTensor& bias_gate,
                              const OptionalTensor& bias_up, int64_t act, double slope);

// y, gate, up
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_glu_forward_z(
    const Device&, const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
    const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope);

// dx, dweight_gate, dweight_up, dbias_gate, dbias_up; undefined where not wanted.
using GluGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A tensor that no wanted gradient reads may be absent: x is read by both dweight, the weights by dx, up by the gradients of
// gate, and gate by those of up and, except without activation, by its own.
GluGradients linear_glu_backward(const Device&, const at::Tensor& grad_y, const OptionalTensor& x,
                                 const OptionalTensor& weight_gate, const OptionalTensor& weight_up,
                                 const OptionalTensor& gate, const OptionalTensor& up, int64_t act, double slope,
                                 bool need_x, bool need_weight_gate, bool need_weight_up, bool need_bias_gate,
                                 bool need_bias_up);

// The same for both halves in one: weight [2N, K], bias [2N] and the preactivations z [..., 2N] are those of the gate and of up,
// or of up and the gate.
at::Tensor linear_glu_packed_forward(const Device&, const at::Tensor& x, const at::Tensor& weight,
                                     const OptionalTensor& bias, int64_t act, double slope, bool gate_first);

// y, z
std::tuple<at::Tensor, at::Tensor> linear_glu_packed_forward_z(const Device&, const at::Tensor& x,
                                                               const at::Tensor& weight, const OptionalTensor& bias,
                                                               int64_t act, double slope, bool gate_first);

// dx, dweight, dbias
Gradients linear_glu_packed_backward(const Device&, const at::Tensor& grad_y, const OptionalTensor& x,
                                     const OptionalTensor& weight, const at::Tensor& z, int64_t act, double slope,
                                     bool gate_first, bool need_x, bool need_weight, bool need_bias);

}  // namespace dlk
