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
// shapes, dtype and kernel set; below 2048 rows also of the number of threads, which decides between 0 and up to 4.
int fused_mlp_slices(const std::vector<Shape>& layers, DType dtype, const Machine&);

// True if the members of an ensemble of such chains run at the same time, each on one thread. Otherwise they run one after
// the other, each on all threads: where those are fewer than threads and large enough for several, and where a layer may go
// to torch's GEMM, whose bits depend on the number of threads.
bool members_in_parallel(int64_t members, const std::vector<Problem>& layers, const Machine&);

}  // namespace dlk::cpu
