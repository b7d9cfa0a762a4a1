#include "planning/linear_glu.h"

namespace dlk {

Halves halves_of(const GluBackwardProblem& p) {
  const auto &gate = p.weight_gate, &up = p.weight_up;
  // Tensors of their own may lie behind each other by chance.
  if (!p.one_memory) return Halves::apart;
  if (gate.row_stride != up.row_stride || gate.col_stride != up.col_stride) return Halves::apart;
  const auto address = [](const View& v) { return reinterpret_cast<intptr_t>(v.data); };
  const int64_t half = p.shape.n * gate.row_stride * element_size(p.dtype);
  if (address(gate) + half == address(up)) return Halves::gate_first;
  if (address(up) + half == address(gate)) return Halves::up_first;
  return Halves::apart;
}

namespace {

// The dgrad of a plan, if what it makes can be added to; else nullptr.
const Step* addable(const Plan& plan) {
  for (const Step& step : plan)
    if (step.kind == StepKind::dgrad && step.path != Path::few_rows) return &step;
  return nullptr;
}

}  // namespace

DxSum dx_sum_of(const Plan& gate, const Plan& up, DType dtype) {
  const Step *first = addable(gate), *second = addable(up);
  if (!first || !second || is_library(first->path) != is_library(second->path)) return DxSum::apart;
  return is_16_bit(dtype) && !is_library(first->path) ? DxSum::unrounded : DxSum::rounded;
}

}  // namespace dlk
