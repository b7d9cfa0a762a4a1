// Op schemas and their implementations. The ops are private: dlkernels/_ops calls them.
#include <torch/library.h>

#include "ops/autograd/derivatives.h"
#include "ops/autograd/linear_act.h"
#include "ops/autograd/linear_glu.h"
#include "ops/autograd/losses.h"
#include "ops/autograd/mlp.h"
#include "ops/autograd/mlp_loss.h"
#include "ops/linear_act.h"
#include "ops/linear_glu.h"
#include "ops/losses.h"
#include "ops/mlp.h"
#include "ops/on_device.h"

TORCH_LIBRARY(dlkernels, m) {
  // Ops that autograd records, from csrc/ops/autograd. The differentiable backwards of gated layers and of losses are written in
  // Python, in dlkernels/_ops.
  m.def("_linear_act(Tensor x, Tensor weight, Tensor? bias, int act, float slope, bool mask) -> Tensor");
  m.def("_linear_act_autocast(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> Tensor");
  m.def(
      "_linear_act_differentiable_backward(Tensor? grad_y, Tensor? grad_saved, Tensor? x, Tensor? weight, "
      "Tensor? saved, Tensor? anchor, int act, float slope, bool need_x, bool need_weight, bool need_bias, "
      "bool stacked) -> (Tensor, Tensor, Tensor)");
  m.def("_act_derivative(Tensor t, Tensor saved, int act, float slope, int order) -> Tensor");
  m.def(
      "_linear_glu(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor? bias_gate, Tensor? bias_up, int act, "
      "float slope) -> Tensor");
  m.def("_linear_glu_packed(Tensor x, Tensor weight, Tensor? bias, int act, float slope, bool gate_first) -> Tensor");
  m.def(
      "_linear_glu_differentiable_backward(Tensor? grad_y, Tensor? grad_gate, Tensor? grad_up, Tensor? x, "
      "Tensor? weight_gate, Tensor? weight_up, Tensor? gate, Tensor? up, int act, float slope, bool need_x, "
      "bool need_weight_gate, bool need_weight_up, bool need_bias_gate, bool need_bias_up) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, int[] acts, float slope) -> Tensor");
  m.def(
      "_mlp_loss(Tensor x, Tensor[] weights, Tensor?[] biases, int[] acts, float slope, Tensor target, int kind, "
      "Tensor? class_weight, int reduction, int ignore_index, float label_smoothing, int[] needs) -> "
      "(Tensor, Tensor, Tensor[])");
  m.def("_mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "_mse_loss_differentiable_backward(Tensor grad_loss, Tensor input, Tensor target, int reduction, "
      "bool need_input, bool need_target) -> (Tensor, Tensor)");
  m.def("_gaussian_nll_loss(Tensor input, Tensor target, Tensor var, bool full, float eps, int reduction) -> Tensor");
  m.def(
      "_gaussian_nll_loss_differentiable_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor var, "
      "bool full, float eps, int reduction, bool need_input, bool need_target, bool need_var) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "_cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing) -> Tensor");
  m.def(
      "_cross_entropy_differentiable_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "int reduction, int ignore_index, float label_smoothing, bool need_input, bool need_target) -> "
      "(Tensor, Tensor)");
  m.def(
      "_linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
      "int reduction, int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "_linear_cross_entropy_differentiable_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor? class_weight, int reduction, int ignore_index, float label_smoothing, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // The kernels.
  m.def("_linear_act_forward(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> Tensor");
  m.def("_linear_act_forward_z(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> (Tensor, Tensor)");
  m.def("_linear_act_forward_mask(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> (Tensor, Tensor)");
  m.def(
      "_linear_act_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor saved, int act, float slope, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("_linear_act_autocast_forward(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> Tensor");
  m.def(
      "_linear_act_autocast_forward_z(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> (Tensor, "
      "Tensor)");
  m.def(
      "_linear_act_autocast_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor saved, ScalarType x_dtype, "
      "int act, float slope, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_linear_glu_forward(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor? bias_gate, Tensor? bias_up, "
      "int act, float slope) -> Tensor");
  m.def(
      "_linear_glu_forward_z(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor? bias_gate, Tensor? bias_up, "
      "int act, float slope) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_linear_glu_backward(Tensor grad_y, Tensor? x, Tensor? weight_gate, Tensor? weight_up, Tensor? gate, "
      "Tensor? up, int act, float slope, bool need_x, bool need_weight_gate, bool need_weight_up, "
      "bool need_bias_gate, bool need_bias_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_linear_glu_packed_forward(Tensor x, Tensor weight, Tensor? bias, int act, float slope, bool gate_first) -> "
      "Tensor");
  m.def(
      "_linear_glu_packed_forward_z(Tensor x, Tensor weight, Tensor? bias, int act, float slope, bool gate_first) -> "
      "(Tensor, Tensor)");
  m.def(
      "_linear_glu_packed_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor z, int act, float slope, "
      "bool gate_first, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("_mlp_forward(Tensor x, Tensor[] weights, Tensor?[] biases, int[] acts, float slope, int[] keep) -> Tensor[]");
  m.def(
      "_mlp_backward(Tensor grad_y, Tensor? x, Tensor?[] weights, Tensor? y, Tensor[] kept, int[] keep, int[] acts, "
      "float slope, int[] needs, bool stacked) -> Tensor[]");
  m.def("_mse_loss_forward(Tensor input, Tensor target, int reduction, bool need_grad) -> (Tensor, Tensor)");
  m.def(
      "_gaussian_nll_loss_forward(Tensor input, Tensor target, Tensor var, bool full, float eps, int reduction, "
      "bool need_input, bool need_var) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool need_input, bool need_target) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
      "Tensor? grad_loss, int reduction, int ignore_index, float label_smoothing, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dlkernels, CompositeImplicitAutograd, m) {
  m.impl("_linear_act", &dlk::linear_act);
  m.impl("_linear_act_autocast", &dlk::linear_act_autocast);
  m.impl("_linear_glu", &dlk::linear_glu);
  m.impl("_linear_glu_packed", &dlk::linear_glu_packed);
  m.impl("_mlp", &dlk::mlp);
  m.impl("_mlp_loss", &dlk::mlp_loss);
  m.impl("_mse_loss", &dlk::mse_loss);
  m.impl("_gaussian_nll_loss", &dlk::gaussian_nll_loss);
  m.impl("_cross_entropy", &dlk::cross_entropy);
  m.impl("_linear_cross_entropy", &dlk::linear_cross_entropy);
}

// Made of operators that torch sees; a batch goes through those too.
#define DLK_IMPLEMENT_IN_TORCH(key)                                                          \
  TORCH_LIBRARY_IMPL(dlkernels, key, m) {                                                    \
    m.impl("_linear_act_differentiable_backward", &dlk::linear_act_differentiable_backward); \
    m.impl("_act_derivative", &dlk::act_derivative);                                         \
  }

DLK_IMPLEMENT_IN_TORCH(CompositeImplicitAutograd)
DLK_IMPLEMENT_IN_TORCH(Batched)
DLK_IMPLEMENT_IN_TORCH(FuncTorchBatchedDecomposition)

#define DLK_IMPLEMENT(key, device)                                                                           \
  TORCH_LIBRARY_IMPL(dlkernels, key, m) {                                                                    \
    m.impl("_linear_act_forward", &dlk::On<dlk::device, dlk::linear_act_forward>::call);                     \
    m.impl("_linear_act_forward_z", &dlk::On<dlk::device, dlk::linear_act_forward_z>::call);                 \
    m.impl("_linear_act_backward", &dlk::On<dlk::device, dlk::linear_act_backward>::call);                   \
    m.impl("_linear_glu_forward", &dlk::On<dlk::device, dlk::linear_glu_forward>::call);                     \
    m.impl("_linear_glu_forward_z", &dlk::On<dlk::device, dlk::linear_glu_forward_z>::call);                 \
    m.impl("_linear_glu_backward", &dlk::On<dlk::device, dlk::linear_glu_backward>::call);                   \
    m.impl("_linear_glu_packed_forward", &dlk::On<dlk::device, dlk::linear_glu_packed_forward>::call);       \
    m.impl("_linear_glu_packed_forward_z", &dlk::On<dlk::device, dlk::linear_glu_packed_forward_z>::call);   \
    m.impl("_linear_glu_packed_backward", &dlk::On<dlk::device, dlk::linear_glu_packed_backward>::call);     \
    m.impl("_mlp_forward", &dlk::On<dlk::device, dlk::mlp_forward>::call);                                   \
    m.impl("_mlp_backward", &dlk::On<dlk::device, dlk::mlp_backward>::call);                                 \
    m.impl("_mse_loss_forward", &dlk::On<dlk::device, dlk::mse_loss_forward>::call);                         \
    m.impl("_gaussian_nll_loss_forward", &dlk::On<dlk::device, dlk::gaussian_nll_loss_forward>::call);       \
    m.impl("_cross_entropy_forward", &dlk::On<dlk::device, dlk::cross_entropy_forward>::call);               \
    m.impl("_linear_cross_entropy_forward", &dlk::On<dlk::device, dlk::linear_cross_entropy_forward>::call); \
  }

// On CPU only: a layer with the casts of autocast. Elsewhere dlkernels/_ops casts before it calls.
#define DLK_IMPLEMENT_CPU(key)                                                                               \
  DLK_IMPLEMENT(key, kCpu)                                                                                   \
  TORCH_LIBRARY_IMPL(dlkernels, key, m) {                                                                    \
    m.impl("_linear_act_autocast_forward", &dlk::On<dlk::kCpu, dlk::linear_act_autocast_forward>::call);     \
    m.impl("_linear_act_autocast_forward_z", &dlk::On<dlk::kCpu, dlk::linear_act_autocast_forward_z>::call); \
    m.impl("_linear_act_autocast_backward", &dlk::On<dlk::kCpu, dlk::linear_act_autocast_backward>::call);   \
  }

DLK_IMPLEMENT_CPU(CPU)
// Layouts the kernels refuse: routed to the same checks, which say so better than the dispatcher would.
DLK_IMPLEMENT_CPU(SparseCPU)
DLK_IMPLEMENT_CPU(SparseCsrCPU)
DLK_IMPLEMENT_CPU(QuantizedCPU)
DLK_IMPLEMENT_CPU(MkldnnCPU)

#ifdef DLKERNELS_CUDA
DLK_IMPLEMENT(CUDA, kCuda)
TORCH_LIBRARY_IMPL(dlkernels, CUDA, m) {
  m.impl("_linear_act_forward_mask", &dlk::On<dlk::kCuda, dlk::linear_act_forward_mask>::call);
}
#endif
