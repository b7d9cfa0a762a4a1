// The backward of a layer where it is itself differentiated, where it gets a batch of gradients, and where gradients have
// tangents. It is made of operators that torch sees, so there are derivatives of every order.
#pragma once

#include <array>

#include "ops/tensors.h"

namespace dlk {

// t · D, elementwise. For order 1, D is dy/dz, where y = act(z), as a function of the saved tensor s, which is y or z. For each
// further order, D is differentiated by s once more. So order 1 makes the gradient of z from the gradient t of y.
at::Tensor act_derivative(const at::Tensor& t, const at::Tensor& s, int64_t act, double slope, int64_t order);

// dx, dweight and dbias of one layer, undefined where not needed or where nothing flows to them. `grad_y` is the gradient of
// y; `grad_saved` that of the saved preactivation, or of a mask's anchor (dlkernels/_ops/masks.py), where a second derivative
// returns through it. Either may be undefined. `saved` is undefined for the identity. `stacked`: the tensors are of an
// ensemble, [members, ...].
struct LayerBackward {
  at::Tensor grad_y, grad_saved, x, weight, saved, anchor;
  int64_t act;
  double slope;
  std::array<bool, 3> needs;
  bool stacked = false;
};
Gradients backward_in_torch(const LayerBackward&);

// a + b, where an undefined one is nothing.
at::Tensor sum_present(const at::Tensor& a, const at::Tensor& b);

// _linear_act_differentiable_backward and _act_derivative of binding.cpp, for dlkernels/_ops.
Gradients linear_act_differentiable_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_saved,
                                             const OptionalTensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& saved, const OptionalTensor& anchor, int64_t act,
                                             double slope, bool need_x, bool need_weight, bool need_bias, bool stacked);

}  // namespace dlk
