// Plans for one layer on CUDA: pure functions of a problem and a machine.
#pragma once

#include "planning/cuda/route.h"
#include "planning/plan.h"
#include "planning/problem.h"

namespace dlk::cuda {

// The questions that a plan asks of the current device. Kernels answer through functions, so that planning includes no CUDA
// and tests can answer for a device.
struct Machine {
  // left, right: x, weight for forward; dz, weight for dgrad; dz, x for wgrad.
  RouteQuery (*query)(Op, const Problem&, const View& left, const View& right);
  int (*splits)(Path, Op, const Problem&);          // slices that a product's sum is cut in
  int64_t (*scratch)(const Step&, const Problem&);  // bytes
};

Plan plan_forward(const ForwardProblem&, const Machine&);
Plan plan_backward(const BackwardProblem&, const Machine&);

}  // namespace dlk::cuda
