// A layer, a chain or a gated layer, handed to the dispatcher; and the modes of torch in which Python decides first.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/optional_tensors.h"

namespace dlk::python {

// Return true under modes of torch in which Python decides at each call: tracing, __torch_function__, transforms, autocast.
bool is_special_mode(at::DeviceType);

// `recorded`: autograd needs the call. Never with a mask, which is saved on CUDA alone.
at::Tensor run_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                     double slope, bool recorded);

// The same of a chain of layers.
at::Tensor run_chain(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
                     double slope, bool recorded);

// The same of a gated layer.
at::Tensor run_gated(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                     const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope,
                     bool recorded);

// The same with both weights in one and both biases in one, the gate's first or last.
at::Tensor run_packed(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                      double slope, bool gate_first, bool recorded);

}  // namespace dlk::python
