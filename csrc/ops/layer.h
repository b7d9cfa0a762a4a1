// One layer, forward and backward, on any device: make the plan, run its steps. linear_act and mlp share it.
#pragma once

#include "ops/device.h"

namespace dlk {

// The tensors that forward fills: y, and where they are defined z and y's mask.
struct Outputs {
  at::Tensor y, z, mask;
};

// The layer below, whose act' dgrad's epilogue may apply to dx. Its dbias may be summed there too.
struct BackwardEpilogue {
  at::Tensor saved;  // undefined: there is none to apply
  Activation act;
  at::Tensor dbias;  // [n of the layer below]; undefined where not wanted
  // Set by layer_backward: the activation gradient was applied, dbias was summed.
  bool applied = false, summed_dbias = false;
};

// y = act(x · weightᵀ + bias), by the steps of `plan`; bias is contiguous or undefined.
void run_forward(const Device&, const Plan& plan, const Problem&, const at::Tensor& x, const at::Tensor& weight,
                 const at::Tensor& bias, const Outputs&);

// Fills the gradients that are defined, by the steps of `plan`. x may be undefined without dweight, weight without dx. dx
// may be accumulators, as `dx_mode` says; a library's product adds to a dx of g's dtype.
void run_backward(const Device&, const Plan& plan, const Problem&, const OutputGrad&, const at::Tensor& x,
                  const at::Tensor& weight, const Gradients&, BackwardEpilogue* below = nullptr,
                  OutputMode dx_mode = OutputMode::cast);

// Both, by the plan that the device makes.
void layer_forward(const Device&, const Problem&, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   const Outputs&);

void layer_backward(const Device&, const Problem&, const OutputGrad&, const at::Tensor& x, const at::Tensor& weight,
                    const Gradients&, BackwardEpilogue* below = nullptr);

}  // namespace dlk
