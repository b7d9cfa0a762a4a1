// Op schemas and their implementations. The ops are private: dlkernels/_ops wraps them in autograd Functions.
#include <torch/library.h>

#include "ops/linear_act.h"
#include "ops/losses.h"
#include "ops/mlp.h"
#include "ops/on_device.h"

TORCH_LIBRARY(dlkernels, m) {
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
  m.def("_mlp_forward(Tensor x, Tensor[] weights, Tensor?[] biases, int[] acts, float slope, int[] keep) -> Tensor[]");
  m.def(
      "_mlp_backward(Tensor grad_y, Tensor? x, Tensor?[] weights, Tensor? y, Tensor[] kept, int[] keep, int[] acts, "
      "float slope, int[] needs) -> Tensor[]");
  m.def("_mse_loss(Tensor input, Tensor target, int reduction, bool need_grad) -> (Tensor, Tensor)");
  m.def(
      "_gaussian_nll_loss(Tensor input, Tensor target, Tensor var, bool full, float eps, int reduction, "
      "bool need_input, bool need_var) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool need_input, bool need_target) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
      "Tensor? grad_loss, int reduction, int ignore_index, float label_smoothing, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define DLK_IMPLEMENT(key, device)                                                           \
  TORCH_LIBRARY_IMPL(dlkernels, key, m) {                                                    \
    m.impl("_linear_act_forward", &dlk::On<dlk::device, dlk::linear_act_forward>::call);     \
    m.impl("_linear_act_forward_z", &dlk::On<dlk::device, dlk::linear_act_forward_z>::call); \
    m.impl("_linear_act_backward", &dlk::On<dlk::device, dlk::linear_act_backward>::call);   \
    m.impl("_mlp_forward", &dlk::On<dlk::device, dlk::mlp_forward>::call);                   \
    m.impl("_mlp_backward", &dlk::On<dlk::device, dlk::mlp_backward>::call);                 \
    m.impl("_mse_loss", &dlk::On<dlk::device, dlk::mse_loss>::call);                         \
    m.impl("_gaussian_nll_loss", &dlk::On<dlk::device, dlk::gaussian_nll_loss>::call);       \
    m.impl("_cross_entropy", &dlk::On<dlk::device, dlk::cross_entropy>::call);               \
    m.impl("_linear_cross_entropy", &dlk::On<dlk::device, dlk::linear_cross_entropy>::call); \
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
