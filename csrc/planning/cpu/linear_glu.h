// Plans of a gated layer on CPU: pure functions of a problem and a machine.
#pragma once

#include "planning/cpu/machine.h"
#include "planning/linear_glu.h"

namespace dlk::cpu {

GluPlan plan_glu_forward(const GluForwardProblem&, const Machine&);
GluPlan plan_glu_backward(const GluBackwardProblem&, const Machine&);
// Of a layer without activation whose g a pass made: the products of one half, or of both in one.
Plan plan_glu_products(const BackwardProblem&, const Machine&);

}  // namespace dlk::cpu
