// The losses with their gradients; see ops/losses.h.
#pragma once

#include "ops/tensors.h"

namespace dlk {

at::Tensor mse_loss(const at::Tensor& input, const at::Tensor& target, int64_t reduction);

at::Tensor gaussian_nll_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                             double eps, int64_t reduction);

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing);

// mse_loss_forward and cross_entropy_forward of ops/losses.h through the dispatcher.
std::tuple<at::Tensor, at::Tensor> call_mse_loss_forward(const at::Tensor& input, const at::Tensor& target,
                                                         int64_t reduction, bool need_grad);
std::tuple<at::Tensor, at::Tensor, at::Tensor> call_cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool need_input, bool need_target);

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& target, const OptionalTensor& class_weight, int64_t reduction,
                                int64_t ignore_index, double label_smoothing);

}  // namespace dlk
