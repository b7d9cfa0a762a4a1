#include "python/explain.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "planning/cpu/plan.h"
#include "planning/cpu/route.h"
#include "python/names.h"
#ifdef DLKERNELS_CUDA
#include "ops/cuda/machine.h"
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

std::vector<std::string> outputs_of(unsigned outputs) {
  constexpr std::pair<Output, const char*> kNames[] = {{kY, "y"},         {kZ, "z"},
                                                       {kMask, "mask"},   {kDz, "dz"},
                                                       {kDx, "dx"},       {kDweight, "dweight"},
                                                       {kDbias, "dbias"}, {kDbiasBelow, "dbias_below"}};
  std::vector<std::string> names;
  for (const auto& [output, name] : kNames)
    if (outputs & output) names.push_back(name);
  return names;
}

// `kernel(step)` and `scratch(step)`: the step's kernel as people read it, and the bytes that it allocates.
template <class Kernel, class Scratch>
py::list steps_of(const Plan& plan, Kernel&& kernel, Scratch&& scratch) {
  py::list steps;
  for (const Step& step : plan) {
    py::dict row;
    row["kind"] = name(step.kind);
    row["path"] = name(step.path);
    row["kernel"] = kernel(step);
    row["makes"] = outputs_of(step.outputs);
    row["dz_in_load"] = step.dz_in_load;
    row["below"] = step.below;
    row["splits"] = step.splits;
    row["scratch_bytes"] = scratch(step);
    row["why"] = step.why;
    steps.append(row);
  }
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

struct RouteRow {
  Path path;
  std::string why;
  int splits;
};

struct CpuPlans {
  const Layer& l;
  const cpu::Machine machine;

  Plan forward(const ForwardProblem& p) const { return cpu::plan_forward(p, machine); }
  Plan backward(const BackwardProblem& p) const { return cpu::plan_backward(p, machine); }
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
  RouteRow route(Op op) const {
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
  int64_t scratch(const Step& step) const { return cuda::kMachine.scratch(step, l.problem); }
  const char* kernel(Path path) const { return cuda::kernel(path, l.problem.dtype); }
  const char* kernel_of(const Step& step) const {
    if (step.kind == StepKind::activation_pass || step.kind == StepKind::gradient_pass) return "elementwise";
    return kernel(step.path);
  }
  RouteRow route(Op op) const {
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

py::tuple explain_fused_mlp(bool cuda, const std::vector<std::array<int64_t, 3>>& layers, const std::string& dtype) {
  const DType type = dtype_named(dtype);
  std::vector<FusedMlpLayer> described;
  std::vector<Shape> shapes;
  for (const auto& [m, n, k] : layers) {
    described.emplace_back();
    described.back().n = n, described.back().k = k;
    shapes.push_back({m, n, k});
  }
  FusedMlp p{};
  p.rows = layers.empty() ? 0 : layers[0][0];
  p.layers = static_cast<int>(layers.size());
  p.layer = described.data();
#ifdef DLKERNELS_CUDA
  if (cuda) {
    const auto [slices, bytes] = cuda::fused_mlp_slices_and_scratch(p, type);
    return py::make_tuple(slices, "fused_mlp, weights in shared memory", bytes);
  }
#else
  refuse_cuda(cuda);
#endif
  const cpu::Machine machine = cpu::this_machine(1, false);
  const int slices = cpu::fused_mlp_slices(shapes, type, machine);
  return py::make_tuple(slices, machine.table(type).ukernel,
                        slices * cpu::fused_mlp_parameters(p) * accumulator_size(type));
}

}  // namespace

void add_explain(py::module_& m) {
  m.def("explain", &explain_layer,
        "The plan of a layer with all gradients: routes of its products, steps of forward and backward.",
        py::arg("cuda"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("act"), py::arg("x"),
        py::arg("weight"), py::arg("beside"), py::arg("saved"), py::arg("bias"), py::arg("below"),
        py::arg("dbias_below"), py::arg("casts"), py::arg("threads"), py::arg("in_bf16"));
  m.def("explain_fused_mlp", &explain_fused_mlp,
        "Slices, kernel and scratch in bytes of the fused MLP kernels for these layers; 0 slices: layer by layer.",
        py::arg("cuda"), py::arg("layers"), py::arg("dtype"));
#ifdef DLKERNELS_CUDA
  // The values of DLKERNELS_CUDA_GEMM.
  m.attr("cuda_paths") = py::make_tuple("simt", "mma", "hopper", "cublas", "fused_mlp");
#endif
}

}  // namespace dlk::python
