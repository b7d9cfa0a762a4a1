// A device, as the ops see it: how it plans a layer, and the functions that run the steps of a plan. There is a table
// per device: cpu/device.cpp and cuda/device.cpp. Everything else of the ops is shared.
#pragma once

#include <c10/util/FunctionRef.h>

#include <vector>

#include "ops/loss_calls.h"
#include "ops/tensors.h"
#include "planning/linear_glu.h"
#include "planning/plan.h"
#include "planning/problem.h"

namespace dlk {

// The gradient of a layer's pre-activation is dz = g · act'(saved). Where `saved` is undefined, g is dz. `saved` is y or z
// [..., N], or y's mask.
struct OutputGrad {
  at::Tensor g, saved;
};

// A product, and the work that kernels of some devices do beside it.
struct Product : Gemm {
  bool saved_is_mask = false, below_is_mask = false;
  void* mask = nullptr;        // of c
  void* column_sum = nullptr;  // dbias of the layer below
};

struct Device {
  Plan (*plan_forward)(const ForwardProblem&);
  Plan (*plan_backward)(const BackwardProblem&);

  // Steps. Each function allocates the scratch that its kernel needs. `like` has the layer's dtype and device.
  void (*product)(const Step&, const Problem&, Product, const at::Tensor& like);
  void (*backward)(const Step&, const Problem&, const OutputGrad&, const at::Tensor& x, const at::Tensor& weight,
                   const Gradients& wanted);
  // y = act(z), in place where z is y. With a bias it adds that to z first, in memory too where z is not y.
  void (*activation_pass)(const Problem&, const at::Tensor& z, const at::Tensor& bias, const at::Tensor& y,
                          const at::Tensor& mask);
  bool (*pass_adds_bias)(DType);                          // activation_pass takes a bias
  void (*derivative_pass)(const DerivativePass&, DType);  // nullptr: torch's operators do that
  // dz has g's dtype; dbias has g's dtype or accumulators. Either may be undefined.
  void (*gradient_pass)(const Problem&, const OutputGrad&, const at::Tensor& dz, const at::Tensor& dbias);
  // A gated layer (ops/linear_glu.h): its plans, and its passes. A fused forward is a product.
  GluPlan (*plan_glu_forward)(const GluForwardProblem&);
  GluPlan (*plan_glu_backward)(const GluBackwardProblem&);
  Plan (*plan_glu_products)(const BackwardProblem&);  // both halves in one layer, behind the gradient pass
  void (*glu_pass)(const Problem&, const GluPass&);
  void (*glu_gradient_pass)(GluGradPass, const at::Tensor& like);
  // A [M, K] with the same values in memory that a product of torch's may read without harm.
  at::Tensor (*library_operand)(const at::Tensor&);

  bool has_masks;  // some layers' forward can store a mask of y
  // Forward of this layer can.
  bool (*takes_mask)(const Problem&);

  // Several narrow layers as one kernel: how they run in this direction, forward, and backward, which takes the slices of its
  // route.
  MlpRoute (*mlp_route)(Direction, const std::vector<Shape>& layers, DType);
  void (*fused_mlp_forward)(const FusedMlp&, DType);
  void (*fused_mlp_backward)(FusedMlp, DType, const at::Tensor& like);
  // Calls body(e) for each member of an ensemble of such chains; on CPU maybe on several threads.
  void (*each_member)(int64_t members, const std::vector<Problem>& layers, c10::function_ref<void(int64_t)> body);

  // The losses. Each fills the gradients of the call and returns the loss.
  at::Tensor (*elementwise_loss)(const ElementwiseLossCall&);
  at::Tensor (*cross_entropy)(const CrossEntropyCall&);
  LossOfLinear (*linear_cross_entropy)(const LinearCrossEntropyCall&);
};

extern const Device kCpu;
extern const Device kCuda;

}  // namespace dlk
