// The current device as planning asks it. No torch header, so that the Python module can ask too.
#pragma once

#include <utility>

#include "planning/cuda/plan.h"

namespace dlk::cuda {

// Answers for the current device.
extern const Machine kMachine;

// The number of slices in which backward's fused MLP kernels cut the rows of these layers on the current device, and their
// scratch in bytes; 0 slices: they do not take the layers. Only rows and the sizes of layers are read.
std::pair<int, int64_t> fused_mlp_slices_and_scratch(FusedMlp, DType);

}  // namespace dlk::cuda
