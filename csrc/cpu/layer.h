// One layer's products, described to the kernels: what linear_act and mlp share.
#pragma once

#include "../check.h"
#include "../linear_act.h"
#include "host.h"

namespace dlk::cpu {

// Our packed product, with the scratch it wants.
void packed_gemm(Gemm p);

// y = act(x · weightᵀ + bias), and z where it is given; bias contiguous or undefined.
void layer_forward(const Checked&, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y,
                   const at::Tensor* z);

// x may be undefined without need_weight, weight without need_x.
Gradients layer_backward(const Checked&, const Incoming&, const at::Tensor& x, const at::Tensor& weight, bool need_x,
                         bool need_weight, bool need_bias, Gate* below = nullptr);

}  // namespace dlk::cpu
