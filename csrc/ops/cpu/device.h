// Functions that the CPU ops share: the machine to plan for, torch's threads, our packed product.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/device.h"
#include "planning/cpu/machine.h"

namespace dlk::cpu {

// This processor with torch's threads and settings. `asks_precision`: bf16_products is needed, for packed products of f32.
Machine machine_for(DType, bool asks_precision = true);

Parallel torch_threads(int threads);

// Elementwise work: an element costs as much as 16 multiplications.
Parallel threads_for_elements(const Machine&, int64_t elements);

// Our packed product, with the scratch that it needs.
void packed_gemm(const PackedProduct&, Gemm, const Machine&);

// Device::gradient_pass, for one layer or for a block of its rows.
void gradient_pass(const Problem&, const OutputGrad&, const at::Tensor& dz, const at::Tensor& dbias);

// A [M, K] for a product of torch's: the same values, with zeros behind the rows in 16 bits. By AMX, oneDNN reads rows of A
// in pieces of 32 and multiplies the values behind a row by 0, so that a NaN there, in padding or in the next row, would
// reach the row's sums.
at::Tensor library_operand(const at::Tensor& a);

// Device's functions of the same names (losses.cpp, linear_cross_entropy.cpp).
at::Tensor elementwise_loss(const ElementwiseLossCall&);
at::Tensor cross_entropy(const CrossEntropyCall&);
LossOfLinear linear_cross_entropy(const LinearCrossEntropyCall&);

}  // namespace dlk::cpu
