#include "planning/cpu/linear_glu.h"

#include "planning/cpu/plan.h"

namespace dlk::cpu {
namespace {

constexpr const char* kFused = "our packed GEMM: x is packed once for both products, and the epilogue takes both";
constexpr const char* kLibrary =
    "a gated layer on a CPU with AMX: torch's GEMM measured faster, our elementwise passes around both products";

bool is_packed(const Plan& half) { return half.count == 1 && half.steps[0].path == Path::packed; }

// Measured on a Xeon with AMX at 1024, 512→1376, one thread, a whole gated MLP against the best of stock. Forward + backward: f32
// 0.97 with our products and 1.10 with torch's, bf16 1.01 and 1.04; forward alone: f32 0.99 and 1.03, bf16 1.08 and 1.05. Both dz lie
// in memory here, so our products save nothing by making it. Forward alone in bf16, two threads, stock's time over ours with our
// products and with torch's: 256, 1024→2816 0.95 and 1.02, 2048→5632 0.97 and 1.05; but 512→1376 1.13 and 0.99.
bool library_is_faster(Op op, const Problem& p, bool forward_alone, const Machine& machine) {
  const auto [m, n, k] = p.shape;
  const bool measured = p.dtype == DType::f32
                            ? !machine.bf16_products
                            : p.dtype == DType::bf16 && (!forward_alone || n * k >= (int64_t{1} << 21));
  const bool large =
      m > 128 && n * k >= (int64_t{1} << 19) && k % 32 == 0 && n % 32 == 0;  // whole tiles: nothing is copied
  if (!measured || !large || machine.forced != Forced::no || machine.isa_capped) return false;
  if (!machine.runs("amx")) return false;
  return !machine.routes || !machine.routes->find(op, p.dtype, p.shape, machine.threads);
}

// Measured on a Xeon with AVX-512 in f32, the time of one fused product over that of two and a pass, one thread and two: 1.12 and 1.01
// at 24, 256→512, 1.10 and 1.07 at 48, 1.07 and 1.02 at 128, 1.03 and 0.99 at 64, 512→1376; but 0.99 and 0.95 at 512, 256→688, and
// 1.02 and 0.71 at 128, 64→128. Both pack weight for few rows, and the fused one has its sums in memory meanwhile.
bool two_products_are_faster(const Problem& p, const Machine& machine) {
  const auto [m, n, k] = p.shape;
  const bool measured = p.dtype == DType::f32 && !machine.bf16_products && machine.runs_avx512();
  return measured && machine.forced == Forced::no && m <= 128 && n * k >= (int64_t{1} << 17);
}

// `make` with a machine that leaves the products to torch, for this reason.
template <class Make>
Plan by_library(Machine machine, Make&& make) {
  machine.forced = Forced::aten;
  Plan plan = make(machine);
  for (int i = 0; i < plan.count; ++i)
    if (is_library(plan.steps[i].path)) plan.steps[i].why = kLibrary;
  return plan;
}

}  // namespace

GluPlan plan_glu_forward(const GluForwardProblem& p, const Machine& machine) {
  const bool library = library_is_faster(Op::forward, p, !p.z, machine);
  auto product = [&](const ForwardProblem& layer) {
    auto make = [&layer](const Machine& m) { return plan_forward(layer, m); };
    return library ? by_library(machine, make) : make(machine);
  };
  GluForwardProblem halves = p;
  halves.packed = false;
  GluPlan plan = dlk::plan_glu_forward(halves, product);
  if (!is_packed(plan.gate) || !is_packed(plan.up) || two_products_are_faster(p, machine))
    return p.packed ? dlk::plan_glu_forward(p, product) : plan;
  plan.fused = true;
  plan.gate.steps[0].outputs = kY | (p.z ? kZ | kZUp : 0u);
  plan.gate.steps[0].why = kFused;
  plan.up = {};
  plan.pass = {};
  return plan;
}

Plan plan_glu_products(const BackwardProblem& p, const Machine& machine) {
  auto make = [&p](const Machine& m) { return plan_backward(p, m); };
  const bool library = (p.dx && library_is_faster(Op::dgrad, p, false, machine)) ||
                       (p.dweight && library_is_faster(Op::wgrad, p, false, machine));
  return library ? by_library(machine, make) : make(machine);
}

GluPlan plan_glu_backward(const GluBackwardProblem& p, const Machine& machine) {
  return dlk::plan_glu_backward(p, [&](const BackwardProblem& half) { return plan_glu_products(half, machine); });
}

}  // namespace dlk::cpu
