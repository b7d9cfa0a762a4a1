#pragma once

#include "planning/cpu/machine.h"
#include "planning/linear_cross_entropy.h"

namespace dlk::cpu {

// shape: rows, classes, in_features; none of the first two is 0.
BlockPlan plan_linear_cross_entropy(const Shape&, DType, const Machine&);

}  // namespace dlk::cpu
