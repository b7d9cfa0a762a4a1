// A chain of layers, h[l+1] = act_l(h[l] · weight_lᵀ + bias_l), for every device: one fused MLP kernel, or layer by layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/device.h"
#include "ops/optional_tensors.h"

namespace dlk {

// Of an ensemble all tensors have the members as their first dimension: x [E, M, K], weights [E, N, K], biases [E, N]. Each
// member has the bits of a call with its own tensors. An ensemble keeps no masks.

// Returns y and, behind it, the tensors that backward takes as `kept`: every h that `keep` asks for, then every z, then the
// masks.
// `keep`: per layer a sum of Keep, or empty for nothing.
enum Keep : int64_t {
  kKeepH = 1,     // the output of a hidden layer
  kKeepZ = 2,     // the pre-activation
  kKeepMask = 4,  // on CUDA, of layers that run one by one: the mask of the output, if the layer has one
};
std::vector<at::Tensor> mlp_forward(const Device&, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& biases, at::IntArrayRef acts, double slope,
                                    at::IntArrayRef keep);

// The gradients among [dx, dweight_0 ..., dbias_0 ...] that `needs`, in the same order, asks for. `keep` is what forward was
// given. Only tensors that these gradients read have to be there: x for dweight_0, weights[l] for the gradients below layer
// l, y where the last layer's act' reads it. `stacked`: of an ensemble.
std::vector<at::Tensor> mlp_backward(const Device&, const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                                     const OptionalTensors& weights, const std::optional<at::Tensor>& y,
                                     at::TensorList kept, at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                     at::IntArrayRef needs, bool stacked);

}  // namespace dlk
