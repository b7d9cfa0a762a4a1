#include "python/explain.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "planning/cpu/linear_glu.h"
#include "planning/cpu/plan.h"
#include "planning/cpu/route.h"
#include "python/names.h"
#ifdef DLKERNELS_CUDA
#include "ops/cuda/machine.h"
#include "planning/cuda/linear_glu.h"
#endif

namespace dlk::python {
namespace {

namespace py = pybind11;

// (address, row stride, column stride) of a 2-D view, strides in elements.
using PyView = std::array<int64_t, 3>;

View view_of(const PyView& v) { return {reinterpret_cast<const void*>(v[0]), v[1], v[2]}; }

// The layer that Python describes.
struct Layer {
  Problem problem;
  View x, weight;
  bool z, mask;  // forward makes them beside y
  bool saved;    // backward applies the layer's own activation gradient
  bool bias, below, dbias_below;
};

using OutputName = std::pair<Output, const char*>;
constexpr OutputName kLayerNames[] = {{kY, "y"},         {kZ, "z"},
                                      {kMask, "mask"},   {kDz, "dz"},
                                      {kDx, "dx"},       {kDweight, "dweight"},
                                      {kDbias, "dbias"}, {kDbiasBelow, "dbias_below"}};
constexpr OutputName kGluNames[] = {{kY, "y"},
                                    {kZ, "gate"},
                                    {kZUp, "up"},
                                    {kDz, "dz_gate"},
                                    {kDzUp, "dz_up"},
                                    {kDx, "dx"},
                                    {kDweight, "dweight_gate"},
                                    {kDweightUp, "dweight_up"},
                                    {kDbias, "dbias_gate"},
                                    {kDbiasUp, "dbias_up"}};

template <class Names>
std::vector<std::string> outputs_of(unsigned outputs, const Names& all) {
  std::vector<std::string> names;
  for (const auto& [output, name] : all)
    if (outputs & output) names.push_back(name);
  return names;
}

// A step as Python reads it. `kernel` as people read it, `scratch`: the bytes that it allocates.
py::dict row_of(const Step& step, const std::vector<std::string>& makes, const std::string& kernel, int64_t scratch) {
  py::dict row;
  row["kind"] = name(step.kind);
  row["path"] = name(step.path);
  row["kernel"] = kernel;
  row["makes"] = makes;
  row["dz_in_load"] = step.dz_in_load;
  row["below"] = step.below;
  row["splits"] = step.splits;
  row["scratch_bytes"] = scratch;
  row["why"] = step.why;
  return row;
}

template <class Kernel, class Scratch>
py::list steps_of(const Plan& plan, Kernel&& kernel, Scratch&& scratch) {
  py::list steps;
  for (const Step& step : plan)
    steps.append(row_of(step, outputs_of(step.outputs, kLayerNames), kernel(step), scratch(step)));
  return steps;
}

template <class Plans>
py::dict plan_of(const Layer& l, const Plans& plans) {
  py::list routes;
  auto add = [&](const char* op_name, Op op) {
    const auto [route, why, splits] = plans.route(op);
    py::dict row;
    row["op"] = op_name;
    row["path"] = name(route);
    row["kernel"] = plans.kernel(route);
    row["splits"] = splits;
    row["why"] = why;
    routes.append(row);
  };
  add("forward", Op::forward);
  add("dgrad", Op::dgrad);
  add("wgrad", Op::wgrad);

  const View grad_y = contiguous_view(l.problem.shape.n);
  auto kernel = [&](const Step& step) { return std::string(plans.kernel_of(step)); };
  auto scratch = [&](const Step& step) { return plans.scratch(step); };
  py::dict out;
  out["routes"] = routes;
  out["forward"] = steps_of(plans.forward({l.problem, l.x, l.weight, l.z, l.mask}), kernel, scratch);
  out["backward"] =
      steps_of(plans.backward({l.problem, grad_y, l.saved, l.x, l.weight, true, true, l.bias, l.below, l.dbias_below}),
               kernel, scratch);
  return out;
}

// The steps of a gated layer, in the order in which they run.
template <class Plans>
struct GluSteps {
  const Plans& plans;  // of one half
  py::list rows;

  void add(const Step& step, unsigned outputs, int64_t scratch) {
    rows.append(row_of(step, outputs_of(outputs, kGluNames), plans.kernel_of(step), scratch));
  }
  // The steps of one half, with the names of its outputs.
  void add_half(const Plan& half, unsigned y, unsigned dweight, int64_t dx_scratch) {
    for (const Step& step : half) {
      const unsigned o = step.outputs;
      add(step, (o & kY ? y : 0) | (o & kDx) | (o & kDweight ? dweight : 0),
          plans.scratch(step) + (o & kDx ? dx_scratch : 0));
    }
  }
  // A pass over both halves takes the memory of a pass over each.
  void add_pass(Step pass) {
    const unsigned outputs = pass.outputs;
    if (!outputs) return;
    pass.outputs = outputs & (kDz | kDbias);
    int64_t scratch = plans.scratch(pass);
    pass.outputs = (outputs & kDzUp ? kDz : 0) | (outputs & kDbiasUp ? kDbias : 0);
    scratch += plans.scratch(pass);
    add(pass, outputs, scratch);
  }
};

// `half`: the plans of one half of the layer, a layer without activation.
template <class Plans>
py::dict glu_plan_of(const Plans& half, Act act, const View& weight_up, bool one_memory, bool packed) {
  const Layer& l = half.l;
  const auto [m, n, k] = l.problem.shape;
  Problem c = l.problem;
  c.act.kind = act;
  const GluPlan forward = half.glu_forward({c, l.x, l.weight, weight_up, true, packed});
  const GluPlan backward =
      half.glu_backward({c, l.x, l.weight, weight_up, one_memory, true, true, l.bias, true, l.bias});
  Layer both = l;
  both.problem.shape.n = 2 * n;
  const Plans both_plans = half.with(both);
  py::dict out;
  GluSteps<Plans> steps{half, py::list()};
  if (forward.fused) {
    const Step& step = forward.gate.steps[0];
    steps.add(step, step.outputs, 2 * half.scratch(step));
  } else {
    steps.add_half(forward.gate, kZ, 0, 0);
    steps.add_half(forward.up, kZUp, 0, 0);
    GluSteps<Plans>{both_plans, steps.rows}.add_half(forward.both, kZ | kZUp, 0, 0);
    steps.add_pass(forward.pass);
  }
  out["fused"] = forward.fused;
  out["forward"] = steps.rows;
  steps.rows = py::list();
  steps.add_pass(backward.pass);
  if (packed) {
    const View dz = contiguous_view(2 * n);
    const Plan products =
        both_plans.glu_products({both.problem, dz, false, l.x, l.weight, true, true, false, false, false});
    for (py::handle row : steps_of(
             products, [&](const Step& step) { return std::string(both_plans.kernel_of(step)); },
             [&](const Step& step) { return both_plans.scratch(step); }))
      steps.rows.append(row);
    out["backward"] = steps.rows;
    return out;
  }
  const int64_t sum = backward.dx_sum == DxSum::unrounded ? m * k * accumulator_size(c.dtype) : 0;
  const int64_t added = backward.dx_sum == DxSum::apart ? m * k * element_size(c.dtype) : 0;
  steps.add_half(backward.gate, kY, kDweight, sum);
  steps.add_half(backward.up, kY, kDweightUp, added);
  GluSteps<Plans> whole{both_plans, steps.rows};
  whole.add_half(backward.dgrad, kY, kDweight, 0);
  out["backward"] = steps.rows;
  return out;
}

struct ChosenRow {
  Path path;
  std::string why;
  int splits;
};

struct CpuPlans {
  const Layer& l;
  const cpu::Machine machine;

  Plan forward(const ForwardProblem& p) const { return cpu::plan_forward(p, machine); }
  Plan backward(const BackwardProblem& p) const { return cpu::plan_backward(p, machine); }
  GluPlan glu_forward(const GluForwardProblem& p) const { return cpu::plan_glu_forward(p, machine); }
  GluPlan glu_backward(const GluBackwardProblem& p) const { return cpu::plan_glu_backward(p, machine); }
  Plan glu_products(const BackwardProblem& p) const { return cpu::plan_glu_products(p, machine); }
  CpuPlans with(const Layer& other) const { return {other, machine}; }
  int64_t scratch(const Step& step) const { return cpu::scratch_bytes(step, l.problem, machine); }
  const char* kernel(Path path) const {
    const bool in_bf16 = l.problem.dtype == DType::f32 && machine.bf16_products && path == Path::packed;
    if (l.problem.casts != Casts::none) return machine.kernels->autocast.ukernel;
    if (in_bf16 && machine.kernels->f32_in_bf16.ukernel) return machine.kernels->f32_in_bf16.ukernel;
    return machine.table(l.problem.dtype).ukernel;
  }
  const char* kernel_of(const Step& step) const {
    if (step.kind == StepKind::activation_pass || step.kind == StepKind::gradient_pass) return "elementwise";
    return is_library(step.path) ? "torch's GEMM" : kernel(step.path);
  }
  ChosenRow route(Op op) const {
    const bool x = l.x.col_stride == 1, weight = l.weight.col_stride == 1;
    const bool contiguous = op == Op::forward ? x && weight : op == Op::dgrad ? weight : x;
    const auto [m, n, k] = l.problem.shape;
    const auto [path, why] = cpu::route(op, l.problem, contiguous, machine);
    int splits = 1;
    if (op == Op::wgrad && path == Path::packed) splits = cpu::gemm_splits(n, k, m);
    if (op == Op::wgrad && path == Path::few_columns) splits = static_cast<int>(cpu::column_slices(m));
    return {path, why, splits};
  }
};

#ifdef DLKERNELS_CUDA
struct CudaPlans {
  const Layer& l;

  Plan forward(const ForwardProblem& p) const { return cuda::plan_forward(p, cuda::kMachine); }
  Plan backward(const BackwardProblem& p) const { return cuda::plan_backward(p, cuda::kMachine); }
  GluPlan glu_forward(const GluForwardProblem& p) const { return cuda::plan_glu_forward(p, cuda::kMachine); }
  GluPlan glu_backward(const GluBackwardProblem& p) const { return cuda::plan_glu_backward(p, cuda::kMachine); }
  Plan glu_products(const BackwardProblem& p) const { return cuda::plan_backward(p, cuda::kMachine); }
  CudaPlans with(const Layer& other) const { return {other}; }
  int64_t scratch(const Step& step) const { return cuda::kMachine.scratch(step, l.problem); }
  const char* kernel(Path path) const { return cuda::kernel(path); }
  const char* kernel_of(const Step& step) const {
    if (step.kind == StepKind::activation_pass || step.kind == StepKind::gradient_pass) return "elementwise";
    return kernel(step.path);
  }
  ChosenRow route(Op op) const {
    const View dz = contiguous_view(l.problem.shape.n);
    const View left = op == Op::forward ? l.x : dz, right = op == Op::wgrad ? l.x : l.weight;
    const cuda::RouteQuery query = cuda::kMachine.query(op, l.problem, left, right);
    const Route route = cuda::route(query);
    return {route.path, cuda::explained(route, query), cuda::kMachine.splits(route.path, op, l.problem)};
  }
};
#endif

[[maybe_unused]] void refuse_cuda(bool cuda) {
  if (cuda) throw std::runtime_error("explain: this build of dlkernels has no CUDA kernels");
}

Layer layer_of(int64_t m, int64_t n, int64_t k, const std::string& dtype, int act, const PyView& x,
               const PyView& weight, const std::string& beside, bool saved, bool bias, bool below, bool dbias_below,
               const std::string& casts) {
  const Casts code = casts.empty() ? Casts::none : casts == "float32" ? Casts::f32_x : Casts::bf16_x;
  const Problem problem = {{m, n, k}, dtype_named(dtype), {static_cast<Act>(act), 0}, code};
  return {problem, view_of(x), view_of(weight), beside == "z", beside == "mask", saved, bias, below, dbias_below};
}

py::dict explain_layer(bool cuda, int64_t m, int64_t n, int64_t k, const std::string& dtype, int act, const PyView& x,
                       const PyView& weight, const std::string& beside, bool saved, bool bias, bool below,
                       bool dbias_below, const std::string& casts, int threads, bool in_bf16) {
  const Layer layer = layer_of(m, n, k, dtype, act, x, weight, beside, saved, bias, below, dbias_below, casts);
#ifdef DLKERNELS_CUDA
  if (cuda) return plan_of(layer, CudaPlans{layer});
#else
  refuse_cuda(cuda);
#endif
  return plan_of(layer, CpuPlans{layer, cpu::this_machine(threads, in_bf16)});
}

py::dict explain_glu(bool cuda, int64_t m, int64_t n, int64_t k, const std::string& dtype, int act, const PyView& x,
                     const PyView& weight_gate, const PyView& weight_up, bool one_memory, bool packed, bool bias,
                     int threads, bool in_bf16) {
  const Layer half = layer_of(m, n, k, dtype, 0, x, weight_gate, "", false, bias, false, false, "");
  const Act kind = static_cast<Act>(act);
#ifdef DLKERNELS_CUDA
  if (cuda) return glu_plan_of(CudaPlans{half}, kind, view_of(weight_up), one_memory, packed);
#else
  refuse_cuda(cuda);
#endif
  return glu_plan_of(CpuPlans{half, cpu::this_machine(threads, in_bf16)}, kind, view_of(weight_up), one_memory, packed);
}

py::tuple explain_mlp(bool cuda, bool backward, const std::vector<std::array<int64_t, 3>>& layers,
                      const std::string& dtype, int threads, bool in_bf16) {
  const DType type = dtype_named(dtype);
  const Direction direction = backward ? Direction::backward : Direction::forward;
  std::vector<Shape> shapes;
  int64_t parameters = 0;
  for (const auto& [m, n, k] : layers) {
    shapes.push_back({m, n, k});
    parameters += n * (k + 1);
  }
#ifdef DLKERNELS_CUDA
  if (cuda) {
    const auto [route, bytes] = cuda::mlp_route_and_scratch(direction, shapes, type);
    return py::make_tuple(route.slices, "fused_mlp, weights in shared memory", bytes, route.why);
  }
#else
  refuse_cuda(cuda);
#endif
  const cpu::Machine machine = cpu::this_machine(threads, in_bf16);
  const MlpRoute route = cpu::mlp_route(direction, shapes, type, machine);
  const int64_t scratch = backward ? route.slices * parameters * accumulator_size(type) : 0;
  return py::make_tuple(route.slices, machine.table(type).ukernel, scratch, route.why);
}

bool explain_members(int64_t members, const std::vector<std::array<int64_t, 3>>& layers, const std::vector<int>& acts,
                     const std::string& dtype, int threads, bool in_bf16) {
  std::vector<Problem> problems;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& [m, n, k] = layers[l];
    problems.push_back({{m, n, k}, dtype_named(dtype), {static_cast<Act>(acts.at(l)), 0}});
  }
  return cpu::members_in_parallel(members, problems, cpu::this_machine(threads, in_bf16));
}

}  // namespace

void add_explain(py::module_& m) {
  m.def("explain", &explain_layer,
        "The plan of a layer with all gradients: routes of its products, steps of forward and backward.",
        py::arg("cuda"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("act"), py::arg("x"),
        py::arg("weight"), py::arg("beside"), py::arg("saved"), py::arg("bias"), py::arg("below"),
        py::arg("dbias_below"), py::arg("casts"), py::arg("threads"), py::arg("in_bf16"));
  m.def("explain_glu", &explain_glu, "The plan of a gated layer with all gradients: steps of forward and backward.",
        py::arg("cuda"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("act"), py::arg("x"),
        py::arg("weight_gate"), py::arg("weight_up"), py::arg("one_memory"), py::arg("packed"), py::arg("bias"),
        py::arg("threads"), py::arg("in_bf16"));
  m.def("explain_mlp", &explain_mlp,
        "Slices, kernel and scratch in bytes of the fused MLP kernel for these layers in one direction, and the "
        "reason; 0 "
        "slices: layer by layer.",
        py::arg("cuda"), py::arg("backward"), py::arg("layers"), py::arg("dtype"), py::arg("threads"),
        py::arg("in_bf16"));
  m.def("explain_members", &explain_members,
        "True if the members of an ensemble of such chains run at the same time on CPU, each on one thread.",
        py::arg("members"), py::arg("layers"), py::arg("acts"), py::arg("dtype"), py::arg("threads"),
        py::arg("in_bf16"));
#ifdef DLKERNELS_CUDA
  // The values of DLKERNELS_CUDA_GEMM.
  m.attr("cuda_paths") = py::make_tuple("simt", "mma", "hopper", "cublas", "fused_mlp");
#endif
}

}  // namespace dlk::python
