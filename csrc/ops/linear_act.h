// Host entry points, CPU and CUDA twins side by side. Shapes: x [..., K], weight [N, K], bias [N], y [..., N].
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dlk {

using OptionalTensor = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // dx, dweight, dbias; undefined where not asked for

// y = act(x · weightᵀ + bias)
at::Tensor linear_act_forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                  int64_t act, double slope);
at::Tensor linear_act_forward_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   int64_t act, double slope);

// The same, and the pre-activation z [..., N] beside it, for activations whose gradient needs it.
std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                            const OptionalTensor& bias, int64_t act, double slope);
std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                             const OptionalTensor& bias, int64_t act, double slope);

// The same, and beside it a bit for each element of y, uint8 [..., N / 8] (params.h), for activations that need only the sign of y, in
// 16 bits and with N a multiple of 8; on CUDA only.
std::tuple<at::Tensor, at::Tensor> linear_act_forward_mask_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                                const OptionalTensor& bias, int64_t act, double slope);

// With dz = grad_y · act'(saved): dx = dz · weight, dweight = dzᵀ · x, dbias = Σ dz. `saved` is y or z, or on CUDA the mask
// that stands for y. x may be absent without need_weight, weight without need_x.
Gradients linear_act_backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                  const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                  bool need_bias);
Gradients linear_act_backward_cuda(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                   const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                   bool need_bias);

// The same under bf16 autocast, the casts inside; on CPU only. x is in f32 or bf16, weight and bias in f32, y, z, grad_y and
// saved in bf16.
at::Tensor linear_act_autocast_forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                           int64_t act, double slope);
std::tuple<at::Tensor, at::Tensor> linear_act_autocast_forward_z_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                                     const OptionalTensor& bias, int64_t act,
                                                                     double slope);
// dx in x_dtype, which is x's where that is given; dweight and dbias in f32.
Gradients linear_act_autocast_backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x,
                                           const OptionalTensor& weight, const at::Tensor& saved,
                                           at::ScalarType x_dtype, int64_t act, double slope, bool need_x,
                                           bool need_weight, bool need_bias);

}  // namespace dlk
