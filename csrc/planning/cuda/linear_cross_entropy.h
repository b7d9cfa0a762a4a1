#pragma once

#include "planning/linear_cross_entropy.h"

namespace dlk::cuda {

// shape: rows, classes, in_features. `given`: rows of a block, 0 for the default.
BlockPlan plan_linear_cross_entropy(const Shape&, DType, int64_t given);

}  // namespace dlk::cuda
