// Which path each product of a layer takes on CPU, and why. A pure function of the problem and the machine.
#pragma once

#include <vector>

#include "planning/cpu/machine.h"
#include "planning/plan.h"

namespace dlk::cpu {

// `contiguous`: those of weight and x that the product reads have 1 as their last stride. few_columns needs that, and
// few_rows needs it in forward and dgrad.
Route route(Op op, const Problem&, bool contiguous, const Machine&);

// The number of slices of rows in which the fused MLP kernels take these layers; 0: they run layer by layer. A function of
// shapes, dtype and kernel set, not of the number of threads.
int fused_mlp_slices(const std::vector<Shape>& layers, DType dtype, const Machine&);

}  // namespace dlk::cpu
