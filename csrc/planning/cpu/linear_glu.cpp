#include "planning/cpu/linear_glu.h"

#include "planning/cpu/plan.h"

namespace dlk::cpu {
namespace {

constexpr const char* kFused = "our packed GEMM: x is packed once for both products, and the epilogue takes both";

bool is_packed(const Plan& half) { return half.count == 1 && half.steps[0].path == Path::packed; }

}  // namespace

GluPlan plan_glu_forward(const GluForwardProblem& p, const Machine& machine) {
  GluPlan plan = dlk::plan_glu_forward(p, [&](const ForwardProblem& half) { return plan_forward(half, machine); });
  if (!is_packed(plan.gate) || !is_packed(plan.up)) return plan;
  plan.fused = true;
  plan.gate.steps[0].outputs = kY | (p.z ? kZ | kZUp : 0u);
  plan.gate.steps[0].why = kFused;
  plan.up = {};
  plan.pass = {};
  return plan;
}

GluPlan plan_glu_backward(const GluBackwardProblem& p, const Machine& machine) {
  return dlk::plan_glu_backward(p, [&](const BackwardProblem& half) { return plan_backward(half, machine); });
}

}  // namespace dlk::cpu
