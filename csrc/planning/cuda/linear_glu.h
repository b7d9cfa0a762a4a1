// Plans of a gated layer on CUDA: two products, and elementwise passes around them.
#pragma once

#include "planning/cuda/plan.h"
#include "planning/linear_glu.h"

namespace dlk::cuda {

inline GluPlan plan_glu_forward(const GluForwardProblem& p, const Machine& machine) {
  return dlk::plan_glu_forward(p, [&](const ForwardProblem& half) { return plan_forward(half, machine); });
}

inline GluPlan plan_glu_backward(const GluBackwardProblem& p, const Machine& machine) {
  return dlk::plan_glu_backward(p, [&](const BackwardProblem& half) { return plan_backward(half, machine); });
}

}  // namespace dlk::cuda
