// Plans of a gated layer on CPU: pure functions of a problem and a machine.
#pragma once

#include "planning/cpu/machine.h"
#include "planning/linear_glu.h"

namespace dlk::cpu {

GluPlan plan_glu_forward(const GluForwardProblem&, const Machine&);
GluPlan plan_glu_backward(const GluBackwardProblem&, const Machine&);
// The products of backward, behind the pass that makes dz: those of one half, or of both halves as one layer.
Plan plan_glu_products(const BackwardProblem&, const Machine&);

}  // namespace dlk::cpu
