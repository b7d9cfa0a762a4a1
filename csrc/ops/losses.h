// Host entry points of the losses. Each returns the loss (of `reduction`: at::Reduction's None, Mean, Sum) and its
// gradients for an incoming gradient of 1, undefined where not asked for, in float32 (float64 for float64).
//
// The CUDA twins read no result back, so that they can be captured in a graph: where the CPU raises for a value, a class
// index out of range or a negative var, they give NaN (cuda/kernels.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dlk {

using OptionalTensor = std::optional<at::Tensor>;
using LossAndGrad = std::tuple<at::Tensor, at::Tensor>;
using LossAndGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// (input - target)², both of one shape; the gradient is input's, and its negative target's.
LossAndGrad mse_loss_cpu(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool need_grad);
LossAndGrad mse_loss_cuda(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool need_grad);

// (ln v + (input - target)²/v)/2, v = max(var, eps), plus ln(2π)/2 with `full`; all of one shape. Gradients of input
// (its negative is target's) and of var, which take v for var.
LossAndGrads gaussian_nll_loss_cpu(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                                   double eps, int64_t reduction, bool need_input, bool need_var);
LossAndGrads gaussian_nll_loss_cuda(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                                    double eps, int64_t reduction, bool need_input, bool need_var);

// input [C], [N, C] or [N, C, d1, ...]; target: class indices [], [N] or [N, d1, ...], or class probabilities of input's
// shape; weight [C]. Gradients of input and of class probabilities.
LossAndGrads cross_entropy_cpu(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_input,
                               bool need_target);
LossAndGrads cross_entropy_cuda(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_input,
                                bool need_target);

// Loss and gradients of x, weight and bias.
using LossOfLinear = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The cross entropy of the logits x · weightᵀ + bias, which never exist whole: x [..., K], weight [classes, K],
// bias [classes], target [...] of class indices, class_weight [classes]. The loss too is in float32 (float64); the
// gradients of bfloat16, which has float32's range, are in bfloat16.
// grad_loss [...]: without reduction, the factor of each row's gradients.
LossOfLinear linear_cross_entropy_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                      const at::Tensor& target, const OptionalTensor& class_weight,
                                      const OptionalTensor& grad_loss, int64_t reduction, int64_t ignore_index,
                                      double label_smoothing, bool need_x, bool need_weight, bool need_bias);
LossOfLinear linear_cross_entropy_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const at::Tensor& target, const OptionalTensor& class_weight,
                                       const OptionalTensor& grad_loss, int64_t reduction, int64_t ignore_index,
                                       double label_smoothing, bool need_x, bool need_weight, bool need_bias);

}  // namespace dlk
