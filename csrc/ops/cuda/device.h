// Functions that the CUDA ops share beside the table of the device.
#pragma once

#include "ops/cuda/machine.h"
#include "ops/device.h"

namespace dlk::cuda {

// dx = dz · weight, or dweight = dzᵀ · x, into `out`: of dz's dtype where `output_mode` is cast, else accumulators.
// For products over some of the rows; layer_backward makes a layer's own.
void rows_product(Op, const Problem&, const at::Tensor& dz, const at::Tensor& other, OutputMode output_mode,
                  at::Tensor out);

// Device's functions of the same names (losses.cpp, linear_cross_entropy.cpp).
at::Tensor elementwise_loss(const ElementwiseLossCall&);
at::Tensor cross_entropy(const CrossEntropyCall&);
LossOfLinear linear_cross_entropy(const LinearCrossEntropyCall&);

}  // namespace dlk::cuda
