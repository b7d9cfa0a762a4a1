// Plans of a gated layer, y = act(x · weight_gateᵀ + bias_gate) · (x · weight_upᵀ + bias_up). Its halves are two layers
// without activation that read the same x, so their plans are those of layers.
#pragma once

#include "planning/plan.h"
#include "planning/problem.h"

namespace dlk {

// shape.n is the out_features of one half.
struct GluForwardProblem : Problem {
  View x, weight_gate, weight_up;
  bool z;       // the preactivations are wanted beside y
  bool packed;  // the weights are the halves of one
};

struct GluBackwardProblem : Problem {
  View x, weight_gate, weight_up;  // null where they are not given
  bool one_memory;                 // the weights are views of one tensor
  bool dx;                         // wanted
  bool dweight_gate, dbias_gate;
  bool dweight_up, dbias_up;

  bool gate() const { return dx || dweight_gate || dbias_gate; }  // the gradient of this preactivation is needed
  bool up() const { return dx || dweight_up || dbias_up; }
};

// How two weights lie in memory: as the halves of one [2n, k] matrix, in either order, or apart.
enum class Halves { apart, gate_first, up_first };
Halves halves_of(const GluBackwardProblem&);

// How dx = dz_gate · weight_gate + dz_up · weight_up is added up where it is two products: the second one adds to the first
// in memory, rounded to dx's dtype between the two or not; or both are rounded and then added.
enum class DxSum { apart, rounded, unrounded };

struct GluPlan {
  // Forward in one step: both products, and the epilogue over both.
  bool fused = false;
  // The products of the halves; of a fused forward `gate` is the one step. In backward they read what `pass` made.
  Plan gate, up;
  // Forward of packed weights that is not fused: one product makes both preactivations, side by side.
  Plan both;
  // Backward: dx as one product, where the weights are halves of one matrix.
  Halves halves = Halves::apart;
  Plan dgrad;
  DxSum dx_sum = DxSum::apart;
  // Elementwise: behind the products of forward, in front of those of backward. Without outputs it does not run.
  Step pass{};
};

DxSum dx_sum_of(const Plan& gate, const Plan& up, DType dtype);

// `plan`: the plan of a layer on the device; a function of ForwardProblem, or of BackwardProblem.
template <class PlanLayer>
GluPlan plan_glu_forward(const GluForwardProblem& p, PlanLayer&& plan) {
  GluPlan made;
  if (p.is_empty()) return made;
  auto product = [&](int64_t n, const View& weight) {
    const Problem layer = {{p.shape.m, n, p.shape.k}, p.dtype, {Act::none, 0}};
    return plan(ForwardProblem{layer, p.x, weight, false, false});
  };
  if (p.packed) {
    made.both = product(2 * p.shape.n, p.weight_gate);
  } else {
    made.gate = product(p.shape.n, p.weight_gate);
    made.up = product(p.shape.n, p.weight_up);
  }
  made.pass = {StepKind::activation_pass, Path::elementwise, kY, kElementwise, false, false, 1};
  return made;
}

template <class PlanLayer>
GluPlan plan_glu_backward(const GluBackwardProblem& p, PlanLayer&& plan) {
  GluPlan made;
  if (p.is_empty()) return made;
  const auto [m, n, k] = p.shape;
  const unsigned products_gate = p.dx || p.dweight_gate ? kDz : 0u, products_up = p.dx || p.dweight_up ? kDzUp : 0u;
  const unsigned outputs = products_gate | products_up | (p.dbias_gate ? kDbias : 0u) | (p.dbias_up ? kDbiasUp : 0u);
  made.pass = {StepKind::gradient_pass, Path::elementwise, outputs, kElementwise, false, false, 1};
  if (p.dx) made.halves = halves_of(p);
  const bool one_dgrad = made.halves != Halves::apart;
  const int64_t pitch = one_dgrad ? 2 * n : n, behind = n * element_size(p.dtype);
  auto half = [&](bool second, const View& weight, bool dweight) {
    // dz as it will lie in memory
    const View dz = contiguous_view(pitch, reinterpret_cast<const void*>(one_dgrad && second ? behind : 0));
    const Problem layer = {p.shape, p.dtype, {Act::none, 0}};
    return plan(BackwardProblem{layer, dz, false, p.x, weight, p.dx && !one_dgrad, dweight, false, false, false});
  };
  made.gate = half(made.halves == Halves::up_first, p.weight_gate, p.dweight_gate);
  made.up = half(made.halves == Halves::gate_first, p.weight_up, p.dweight_up);
  if (p.dx && !one_dgrad) made.dx_sum = dx_sum_of(made.gate, made.up, p.dtype);
  if (one_dgrad) {
    const Problem both = {{m, 2 * n, k}, p.dtype, {Act::none, 0}};
    const View weight = made.halves == Halves::gate_first ? p.weight_gate : p.weight_up;
    made.dgrad =
        plan(BackwardProblem{both, contiguous_view(2 * n), false, p.x, weight, true, false, false, false, false});
  }
  return made;
}

}  // namespace dlk
