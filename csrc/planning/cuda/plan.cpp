#include "planning/cuda/plan.h"

namespace dlk::cuda {
Plan plan_forward(const ForwardProblem& p, const Machine& machine) {
  Plan plan;
  if (p.is_empty()) return plan;
  const auto [path, why] = route(machine.query(Op::forward, p, p.x, p.weight));
  const unsigned outputs = kY | (p.z ? kZ : 0u) | (p.mask ? kMask : 0u);
  if (!is_library(path)) {
    plan.add({StepKind::forward, path, outputs, why, false, false, machine.splits(path, Op::forward, p)});
    return plan;
  }
  plan.add({StepKind::forward, path, p.z ? kZ : kY, why, false, false, 1});
  if (p.z || p.act.kind != Act::none)
    plan.add({StepKind::activation_pass, Path::elementwise, kY | (p.mask ? kMask : 0u), kElementwise, false, false, 1});
  return plan;
}

Plan plan_backward(const BackwardProblem& p, const Machine& machine) {
  Plan plan;
  if (p.is_empty()) return plan;
  bool dx = p.dx && p.shape.k > 0, dweight = p.dweight && p.shape.k > 0;  // others have no elements
  bool dbias = p.dbias;
  const View dz = p.saved ? contiguous_view(p.shape.n) : p.grad_y;  // as it would lie in memory
  constexpr Route kNothing = {Path::simt, ""};
  Route for_dx = dx ? route(machine.query(Op::dgrad, p, dz, p.weight)) : kNothing;
  Route for_dweight = dweight ? route(machine.query(Op::wgrad, p, dz, p.x)) : kNothing;

  // A narrow layer's products are one launch, which makes dz and dbias on the way.
  const bool narrow_dx = dx && for_dx.path == Path::fused_mlp;
  const bool narrow_dweight = dweight && for_dweight.path == Path::fused_mlp;
  if (narrow_dx || narrow_dweight) {
    plan.add({StepKind::backward, Path::fused_mlp,
              (narrow_dx ? kDx : 0u) | (narrow_dweight ? kDweight : 0u) | (dbias ? kDbias : 0u),
              narrow_dx ? for_dx.why : for_dweight.why, p.saved, false, machine.splits(Path::fused_mlp, Op::wgrad, p)});
    if (narrow_dx) dx = false, for_dx = kNothing;
    if (narrow_dweight) dweight = false, for_dweight = kNothing;
    dbias = false;
  }

  // Three ways to make dz. Products on plain FMAs make it in their operand loads, which needs the fewest launches. So
  // does a lone wgrad on tensor cores, as in a network's first layer, and it adds up dbias on the way. Otherwise one
  // pass makes dz and dbias.
  const bool all_simt = for_dx.path == Path::simt && for_dweight.path == Path::simt;
  const bool lone_wgrad = !dx && for_dweight.path == Path::mma && p.saved;
  const bool in_load = dweight && (all_simt || lone_wgrad) && (p.saved || dbias);
  const bool stores_dz = (dx || dweight) && p.saved && !all_simt && !in_load;
  const bool dbias_with_dweight = in_load && dbias;
  const unsigned from_pass = (stores_dz ? kDz : 0u) | (dbias && !dbias_with_dweight ? kDbias : 0u);
  if (from_pass) plan.add({StepKind::gradient_pass, Path::elementwise, from_pass, kElementwise, true, false, 1});
  const bool dz_in_load = p.saved && !stores_dz;
  if (dx) {
    const bool below = p.below && !is_library(for_dx.path);
    const bool dbias_below = below && p.dbias_below && for_dx.path != Path::simt;    // its kernel adds up no columns
    const int splits = dbias_below ? 1 : machine.splits(for_dx.path, Op::dgrad, p);  // slices leave no column sums
    plan.add(
        {StepKind::dgrad, for_dx.path, kDx | (dbias_below ? kDbiasBelow : 0u), for_dx.why, dz_in_load, below, splits});
  }
  if (dweight)
    plan.add({StepKind::wgrad, for_dweight.path, kDweight | (dbias_with_dweight ? kDbias : 0u), for_dweight.why,
              dz_in_load, false, machine.splits(for_dweight.path, Op::wgrad, p)});
  return plan;
}

}  // namespace dlk::cuda
