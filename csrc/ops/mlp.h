// A chain of layers, h[l+1] = act_l(h[l] · weight_lᵀ + bias_l), for every device: one fused MLP kernel, or layer by layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

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

// The user of a layer's gradients, who gets them while they are in cache.
struct GradientUser {
  // Called when backward has finished a layer: from the last one to the first. It reads the weight and bias of that layer no
  // more. A gradient that is not wanted is undefined.
  c10::function_ref<void(size_t layer, const at::Tensor& dweight, const at::Tensor& dbias)> use;
  bool keeps;  // the gradients are also returned; else all dweights take turns in one memory, and nothing is returned
};

// mlp_backward of a chain that is no ensemble.
std::vector<at::Tensor> mlp_backward_for(const Device&, const GradientUser&, const at::Tensor& grad_y,
                                         const std::optional<at::Tensor>& x, const OptionalTensors& weights,
                                         const std::optional<at::Tensor>& y, at::TensorList kept, at::IntArrayRef keep,
                                         at::IntArrayRef acts, double slope, at::IntArrayRef needs);

}  // namespace dlk
