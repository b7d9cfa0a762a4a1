// One layer's products on CUDA, described to the kernels: what linear_act and mlp share.
#pragma once

#include "ops/check.h"
#include "ops/host.h"
#include "ops/linear_act.h"
#include "planning/cuda/route.h"

namespace dlk::cuda {

// y = act(x · weightᵀ + bias); bias contiguous or undefined. On the current device.
void layer_forward(const Problem&, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, Outputs);

// x may be undefined without need_weight, weight without need_x.
Gradients layer_backward(const Problem&, const OutputGrad&, const at::Tensor& x, const at::Tensor& weight, bool need_x,
                         bool need_weight, bool need_bias, BackwardEpilogue* below = nullptr);

// dx = dz · weight, or dweight = dzᵀ · x, into `out`: of dz's dtype where `output_mode` is cast, else accumulators.
// For products over some of the rows; a layer's own are layer_backward's.
void layer_product(Op, const Problem&, const at::Tensor& dz, const at::Tensor& other, OutputMode output_mode,
                   at::Tensor out);
// dbias = Σ dz, of dz's dtype or accumulators.
void layer_dbias(const Problem&, const at::Tensor& dz, const at::Tensor& dbias);

// Whether the layer has a mask; see params.h.
bool takes_mask(const Problem&);
bool is_mask(const at::Tensor& saved);

// A chain's backward with the scratch it wants; `like` is of its dtype and on its device.
void run_fused_mlp_backward(FusedMlp, DType, const at::Tensor& like);

// Compute capability of the current device, 90 for 9.0.
int current_arch();
// hopper_available(), asked once.
bool hopper_here(int arch);
// Whether torch lets f32 products round their operands to TF32.
bool tf32_allowed();

}  // namespace dlk::cuda
