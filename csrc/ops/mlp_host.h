// A chain of layers on any device: checks, what forward keeps for backward, and the way layer by layer. What is a
// device's own comes in as functions.
#pragma once

#include "ops/check.h"
#include "ops/host.h"
#include "ops/linear_act.h"
#include "ops/mlp.h"

namespace dlk {

struct MlpKernels {
  // The chain kernels: whether they take this chain (of rows, and every layer's sizes), forward, and backward, which brings
  // its own slices and partials. `like` is of the chain's dtype and on its device.
  bool (*takes)(const FusedMlp&, DType);
  void (*fused_mlp_forward)(const FusedMlp&, DType);
  void (*fused_mlp_backward)(FusedMlp, DType, const at::Tensor& like);
  // One layer, see cpu/layer.h and cuda/layer.h.
  void (*layer_forward)(const Problem&, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Outputs);
  Gradients (*layer_backward)(const Problem&, const OutputGrad&, const at::Tensor& x, const at::Tensor& weight,
                              bool need_x, bool need_weight, bool need_bias, BackwardEpilogue* below);
  bool dgrad_sums_dbias;               // layer_backward may fill BackwardEpilogue::dbias
  bool (*takes_mask)(const Problem&);  // the layer's mask may stand for its y
};

// The entry points of mlp.h.
std::vector<at::Tensor> mlp_forward(const MlpKernels&, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& biases, at::IntArrayRef acts, double slope,
                                    at::IntArrayRef keep);
std::vector<at::Tensor> mlp_backward(const MlpKernels&, const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                                     const OptionalTensors& weights, const std::optional<at::Tensor>& y,
                                     at::TensorList kept, at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                     at::IntArrayRef needs);

}  // namespace dlk
