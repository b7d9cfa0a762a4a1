// The losses, for every device. Each returns the loss and its gradients for an incoming gradient of 1; gradients are undefined
// where they are not wanted, and in float32 (float64 for float64). `reduction` is at::Reduction's None, Mean or Sum.
//
// On CUDA nothing is read back, so that a loss can be captured in a graph: where the CPU raises for a value (a class index out
// of range, a negative var), CUDA gives NaN (kernels/cuda/kernels.h).
#pragma once

#include "ops/device.h"

namespace dlk {

using LossAndGrad = std::tuple<at::Tensor, at::Tensor>;
using LossAndGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// (input - target)², both of one shape. The gradient is input's, and its negative target's.
LossAndGrad mse_loss_forward(const Device&, const at::Tensor& input, const at::Tensor& target, int64_t reduction,
                             bool need_grad);

// (ln v + (input - target)²/v)/2, v = max(var, eps), plus ln(2π)/2 with `full`; all of one shape. Gradients of input
// (its negative is target's) and of var, which take v for var.
LossAndGrads gaussian_nll_loss_forward(const Device&, const at::Tensor& input, const at::Tensor& target,
                                       const at::Tensor& var, bool full, double eps, int64_t reduction, bool need_input,
                                       bool need_var);

// input [C], [N, C] or [N, C, d1, ...]; target: class indices [], [N] or [N, d1, ...], or class probabilities of input's
// shape; weight [C]. Gradients of input and of class probabilities.
LossAndGrads cross_entropy_forward(const Device&, const at::Tensor& input, const at::Tensor& target,
                                   const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                   double label_smoothing, bool need_input, bool need_target);

// The cross entropy of the logits x · weightᵀ + bias, which never exist whole: x [..., K], weight [classes, K],
// bias [classes], target [...] of class indices, class_weight [classes]. Returns the loss and the gradients of x, weight and
// bias. The loss too is in float32 (float64); the gradients of bfloat16, which has float32's range, are in bfloat16.
// grad_loss [...]: without reduction, the factor of each row's gradients.
LossOfLinear linear_cross_entropy_forward(const Device&, const at::Tensor& x, const at::Tensor& weight,
                                          const OptionalTensor& bias, const at::Tensor& target,
                                          const OptionalTensor& class_weight, const OptionalTensor& grad_loss,
                                          int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_x,
                                          bool need_weight, bool need_bias);

}  // namespace dlk
