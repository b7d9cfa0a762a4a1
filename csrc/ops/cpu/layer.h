// One layer's products, described to the kernels: what linear_act and mlp share.
#pragma once

#include "ops/check.h"
#include "ops/linear_act.h"
#include "ops/cpu/host.h"

namespace dlk::cpu {

// Our packed product, with the scratch it wants.
void packed_gemm(Gemm p);

// y = act(x · weightᵀ + bias), and z where it is given; bias contiguous or undefined. All of one dtype, but with the
// kernels of autocast.
void layer_forward(const Problem&, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y,
                   const at::Tensor* z, const AutocastLayer* autocast);

// Fills the gradients that are defined. x may be undefined without dweight, weight without dx.
void layer_backward(const Problem&, const OutputGrad&, const at::Tensor& x, const at::Tensor& weight, Gradients&,
                    BackwardEpilogue* below, const AutocastLayer* autocast);

// As MlpKernels wants them.
inline void layer_forward(const Problem& c, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          Outputs out) {
  layer_forward(c, x, weight, bias, out.y, out.z.defined() ? &out.z : nullptr, nullptr);
}
inline Gradients layer_backward(const Problem& c, const OutputGrad& in, const at::Tensor& x, const at::Tensor& weight,
                                bool need_x, bool need_weight, bool need_bias, BackwardEpilogue* below = nullptr) {
  Gradients made = new_gradients(c.shape, in.g, need_x, need_weight, need_bias);
  layer_backward(c, in, x, weight, made, below, nullptr);
  return made;
}

// A [M, K] for a product of torch's: the same values, with zeros behind the rows in 16 bits. By AMX, oneDNN reads rows of A in
// pieces of 32 and multiplies what lies behind a row by 0, so that a NaN there, in padding or in the next row, would reach
// the row's sums.
at::Tensor for_library(const at::Tensor& a);

}  // namespace dlk::cpu
