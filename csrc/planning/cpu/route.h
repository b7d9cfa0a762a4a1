// Which path each product of a layer takes on CPU, and why. A pure function of the problem and the machine.
#pragma once

#include <vector>

#include "planning/cpu/machine.h"
#include "planning/plan.h"

namespace dlk::cpu {

// `contiguous`: those of weight and x that the product reads have 1 as their last stride. few_columns needs that, and
// few_rows needs it in forward and dgrad.
Route route(Op op, const Problem&, bool contiguous, const Machine&);

// How a chain of layers runs, forward or backward. The route table decides, if the kernels take the layers and it has a row for
// this number of threads or for any; else a rule: a function of shapes, dtype and kernel set, and below 2048 rows of the
// number of threads too, which decides between 0 and up to 4 slices.
MlpRoute mlp_route(Direction, const std::vector<Shape>& layers, DType, const Machine&);

// True if the members of an ensemble of such chains run at the same time, each on one thread. Otherwise they run one after
// the other, each on all threads: where those are fewer than threads and large enough for several, and where a layer may go
// to torch's GEMM, whose bits depend on the number of threads.
bool members_in_parallel(int64_t members, const std::vector<Problem>& layers, const Machine&);

}  // namespace dlk::cpu
