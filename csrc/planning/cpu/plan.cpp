#include "planning/cpu/plan.h"

#include "planning/cpu/route.h"
#include "planning/product.h"

namespace dlk::cpu {
Plan plan_forward(const ForwardProblem& p, const Machine& machine) {
  Plan plan;
  if (p.is_empty()) return plan;
  const bool contiguous = p.x.col_stride == 1 && p.weight.col_stride == 1;
  const auto [path, why] = route(Op::forward, p, contiguous, machine);
  const unsigned outputs = kY | (p.z ? kZ : 0);
  if (!is_library(path)) {
    plan.add({StepKind::forward, path, outputs, why, false, false, 1});
    return plan;
  }
  plan.add({StepKind::forward, path, p.z ? kZ : kY, why, false, false, 1});
  if (p.z || p.act.kind != Act::none)
    plan.add({StepKind::activation_pass, Path::elementwise, kY, kElementwise, false, false, 1});
  return plan;
}

namespace {

// Both products would make dz while they pack it, and act' takes long beside a product by tiles. So one pass makes dz for both.
// Measured on a Xeon with AMX, one thread, backward in µs with dz made twice and by a pass: gelu 5120, 320→448 7420 and 6580, 1024,
// 256→256 820 and 670, 4096, 64→64 756 and 510; silu 7340 and 6400, 785 and 640, 730 and 490. tanh, which is cheaper: no gain.
bool is_made_once(const BackwardProblem& p, Path dgrad, Path wgrad, const Machine& machine) {
  const bool long_act = p.act.kind == Act::gelu || p.act.kind == Act::gelu_tanh || p.act.kind == Act::silu;
  const bool both_pack = p.dx && p.dweight && dgrad == Path::packed && wgrad == Path::packed;
  return p.saved && long_act && both_pack && p.casts == Casts::none && p.dtype == DType::bf16 && machine.runs("amx") &&
         p.shape.m * p.shape.n >= (int64_t{1} << 16);
}

}  // namespace

Plan plan_backward(const BackwardProblem& p, const Machine& machine) {
  Plan plan;
  if (p.is_empty()) return plan;
  const auto [m, n, k] = p.shape;
  const bool dx = p.dx && k > 0, dweight = p.dweight && k > 0;  // others have no elements
  const Route for_dx = route(Op::dgrad, p, p.weight.col_stride == 1, machine);
  const Route for_dweight = route(Op::wgrad, p, p.x.col_stride == 1, machine);
  const bool library_dx = dx && is_library(for_dx.path), library_dweight = dweight && is_library(for_dweight.path);
  // Our wgrad reads every element of dz. Where packing rounds them, it cannot add up dbias.
  const bool adds_dbias =
      dweight && !library_dweight && (for_dweight.path != Path::packed || machine.packed(p, Op::wgrad).exact);

  // A library's product reads dz from memory. Where dz lies there, our products read it too.
  const bool makes_dz =
      p.saved && (library_dx || library_dweight || is_made_once(p, for_dx.path, for_dweight.path, machine));
  const bool dbias_with_dweight = p.dbias && adds_dbias && !makes_dz, in_load = p.saved && !makes_dz;
  const unsigned from_pass = (makes_dz ? kDz : 0u) | (p.dbias && !dbias_with_dweight ? kDbias : 0u);
  if (from_pass) plan.add({StepKind::gradient_pass, Path::elementwise, from_pass, kElementwise, true, false, 1});
  if (library_dx) plan.add({StepKind::dgrad, for_dx.path, kDx, for_dx.why, false, false, 1});
  if (library_dweight) plan.add({StepKind::wgrad, for_dweight.path, kDweight, for_dweight.why, false, false, 1});

  // Few columns: one pass over the rows makes all that takes this path.
  const bool columns_dx = dx && for_dx.path == Path::few_columns;
  const bool columns_dweight = dweight && for_dweight.path == Path::few_columns;
  const unsigned with_dweight = kDweight | (dbias_with_dweight ? kDbias : 0u);
  if (columns_dx || columns_dweight)
    plan.add({StepKind::backward, Path::few_columns, (columns_dx ? kDx : 0u) | (columns_dweight ? with_dweight : 0u),
              columns_dx ? for_dx.why : for_dweight.why, p.saved, false,
              columns_dweight ? static_cast<int>(column_slices(m)) : 1});

  if (dx && !library_dx && !columns_dx)
    plan.add({StepKind::dgrad, for_dx.path, kDx, for_dx.why, in_load, p.below && for_dx.path == Path::packed, 1});
  if (dweight && !library_dweight && !columns_dweight)
    plan.add({StepKind::wgrad, for_dweight.path, with_dweight, for_dweight.why, in_load, false,
              for_dweight.path == Path::packed ? gemm_splits(n, k, m) : 1});
  return plan;
}

int64_t scratch_bytes(const Step& step, const Problem& p, const Machine& machine) {
  const auto [m, n, k] = p.shape;
  const int64_t accumulator = accumulator_size(p.dtype), element = element_size(p.dtype);
  switch (step.kind) {
    case StepKind::activation_pass: return 0;
    case StepKind::gradient_pass:
      return (step.outputs & kDz ? m * n * element : 0) + (step.outputs & kDbias ? slices(m) * n * accumulator : 0);
    case StepKind::backward: return step.splits > 1 ? step.splits * n * (k + 1) * accumulator : 0;
    default: break;
  }
  if (is_library(step.path) &&
      step.kind != StepKind::wgrad) {  // library_operand of csrc/ops/cpu copies rows in 16 bits
    const int64_t row = step.kind == StepKind::forward ? k : n;
    return is_16_bit(p.dtype) && row % 32 ? m * (row / 32 + 1) * 32 * element : 0;
  }
  if (step.path != Path::packed) return 0;
  const Op op = step.kind == StepKind::forward ? Op::forward : step.kind == StepKind::dgrad ? Op::dgrad : Op::wgrad;
  const View rows = contiguous_view(k);  // how x and weight lie decides how a forward is multiplied (transposed.h)
  Gemm described = product(op, p.shape, p.dtype, rows, rows);
  described.splits = step.splits;
  described.row_sum = step.outputs & kDbias ? &described : nullptr;  // only compared with null
  return machine.packed(p, op).panels_size(described, machine.threads_for(m * n * k)) +
         partials_size(described) * accumulator;
}

}  // namespace dlk::cpu
