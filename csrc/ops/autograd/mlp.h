// mlp with its gradients.
#pragma once

#include "ops/mlp.h"

namespace dlk {

// The chain of layers h[l+1] = act_l(h[l] · weight_lᵀ + bias_l).
at::Tensor mlp(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
               double slope);

// The tensors that backward reads. The others are not saved: they cost no memory and may be changed in place before
// backward, as in stock torch.
struct Saves {
  bool x, y;
  size_t first_weight = 0;    // only layers above the lowest one with a gradient need a dgrad
  std::vector<int64_t> keep;  // per layer a sum of Keep
  size_t values = 0;          // the number of h and z that forward keeps
  size_t constants = 0;       // so many of them, the first ones, depend on nothing that requires a gradient
};

// `needs`: for x, each weight and each bias, nonzero if its gradient is needed.
Saves saves_for(at::IntArrayRef acts, at::IntArrayRef needs);

// mlp_forward and mlp_backward of ops/mlp.h through the dispatcher.
std::vector<at::Tensor> call_mlp_forward(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         at::IntArrayRef acts, double slope, at::IntArrayRef keep);
std::vector<at::Tensor> call_mlp_backward(const at::Tensor& grad_y, const OptionalTensor& x,
                                          const OptionalTensors& weights, const OptionalTensor& y, at::TensorList kept,
                                          at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                          at::IntArrayRef needs, bool stacked);

}  // namespace dlk
