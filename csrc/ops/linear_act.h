// y = act(x · weightᵀ + bias) and its gradients, for every device. x [..., K], weight [N, K], bias [N], y [..., N].
#pragma once

#include "ops/device.h"

namespace dlk {

at::Tensor linear_act_forward(const Device&, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              int64_t act, double slope);

// y, and the pre-activation z [..., N] for activations whose gradient reads it.
std::tuple<at::Tensor, at::Tensor> linear_act_forward_z(const Device&, const at::Tensor& x, const at::Tensor& weight,
                                                        const OptionalTensor& bias, int64_t act, double slope);

// y, and its mask, uint8 [..., N / 8]: for relu and leaky_relu, in 16 bits, with N a multiple of 8, on CUDA.
std::tuple<at::Tensor, at::Tensor> linear_act_forward_mask(const Device&, const at::Tensor& x, const at::Tensor& weight,
                                                           const OptionalTensor& bias, int64_t act, double slope);

// With dz = grad_y · act'(saved): dx = dz · weight, dweight = dzᵀ · x, dbias = Σ dz. `saved` is y, z or y's mask. x may be
// absent without need_weight, weight without need_x.
Gradients linear_act_backward(const Device&, const at::Tensor& grad_y, const OptionalTensor& x,
                              const OptionalTensor& weight, const at::Tensor& saved, int64_t act, double slope,
                              bool need_x, bool need_weight, bool need_bias);

// These run under bf16 autocast and cast inside; on CPU only. x is in f32 or bf16, weight and bias in f32; y, z,
// grad_y and saved in bf16.
at::Tensor linear_act_autocast_forward(const Device&, const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, int64_t act, double slope);
std::tuple<at::Tensor, at::Tensor> linear_act_autocast_forward_z(const Device&, const at::Tensor& x,
                                                                 const at::Tensor& weight, const OptionalTensor& bias,
                                                                 int64_t act, double slope);
// dx has the dtype x_dtype, which is x's where x is given; dweight and dbias are in f32.
Gradients linear_act_autocast_backward(const Device&, const at::Tensor& grad_y, const OptionalTensor& x,
                                       const OptionalTensor& weight, const at::Tensor& saved, at::ScalarType x_dtype,
                                       int64_t act, double slope, bool need_x, bool need_weight, bool need_bias);

}  // namespace dlk
