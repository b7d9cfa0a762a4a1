// Plans for one layer on CPU: pure functions of a problem and a machine.
#pragma once

#include "planning/cpu/machine.h"
#include "planning/plan.h"
#include "planning/problem.h"

namespace dlk::cpu {

Plan plan_forward(const ForwardProblem&, const Machine&);
Plan plan_backward(const BackwardProblem&, const Machine&);

// Bytes that a step allocates besides y, z and the gradients: dz, partial sums, packed panels, copies for a library. Buffers
// that threads keep between calls are not counted.
int64_t scratch_bytes(const Step&, const Problem&, const Machine&);

}  // namespace dlk::cpu
