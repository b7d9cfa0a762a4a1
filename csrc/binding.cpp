// Op schemas and their implementations. The ops are private: dlkernels/_ops wraps them in autograd Functions.
#include <torch/library.h>

#include "linear_act.h"

TORCH_LIBRARY(dlkernels, m) {
  m.def("_linear_act_forward(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> Tensor");
  m.def("_linear_act_forward_z(Tensor x, Tensor weight, Tensor? bias, int act, float slope) -> (Tensor, Tensor)");
  m.def(
      "_linear_act_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor saved, int act, float slope, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

#define DLK_IMPLEMENT(key, suffix)                                             \
  TORCH_LIBRARY_IMPL(dlkernels, key, m) {                                      \
    m.impl("_linear_act_forward", &dlk::linear_act_forward_##suffix);          \
    m.impl("_linear_act_forward_z", &dlk::linear_act_forward_z_##suffix);      \
    m.impl("_linear_act_backward", &dlk::linear_act_backward_##suffix);        \
  }

DLK_IMPLEMENT(CPU, cpu)
// Layouts the kernels refuse: routed to the same checks, which say so better than the dispatcher would.
DLK_IMPLEMENT(SparseCPU, cpu)
DLK_IMPLEMENT(SparseCsrCPU, cpu)
DLK_IMPLEMENT(QuantizedCPU, cpu)
DLK_IMPLEMENT(MkldnnCPU, cpu)

#ifdef DLKERNELS_CUDA
DLK_IMPLEMENT(CUDA, cuda)
#endif
