// The current device as planning asks it. No torch header, so that the Python module can ask too.
#pragma once

#include <utility>
#include <vector>

#include "planning/cuda/plan.h"

namespace dlk::cuda {

// Answers for the current device.
extern const Machine kMachine;

// How a chain of layers runs on the current device, and the scratch of its kernel in bytes.
std::pair<MlpRoute, int64_t> mlp_route_and_scratch(Direction, const std::vector<Shape>& layers, DType);

}  // namespace dlk::cuda
