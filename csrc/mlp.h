// Host entry points of a chain of layers, h[l+1] = act_l(h[l] · weight_lᵀ + bias_l), CPU and CUDA twins.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace dlk {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// y, and with `keep` behind it what backward takes as `kept`: h[1] … h[L-1], then z of every layer whose act' reads it, then
// the masks that stand for h (on CUDA).
std::vector<at::Tensor> mlp_forward_cpu(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                        at::IntArrayRef acts, double slope, bool keep);
std::vector<at::Tensor> mlp_forward_cuda(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         at::IntArrayRef acts, double slope, bool keep);

// [dx, dweight_0 …, dbias_0 …]; undefined where `needs`, of the same order, is 0. y only where the last layer's act'
// reads it.
std::vector<at::Tensor> mlp_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, at::TensorList weights,
                                         const std::optional<at::Tensor>& y, at::TensorList kept, at::IntArrayRef acts,
                                         double slope, at::IntArrayRef needs);
std::vector<at::Tensor> mlp_backward_cuda(const at::Tensor& grad_y, const at::Tensor& x, at::TensorList weights,
                                          const std::optional<at::Tensor>& y, at::TensorList kept, at::IntArrayRef acts,
                                          double slope, at::IntArrayRef needs);

}  // namespace dlk
