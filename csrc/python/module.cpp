// The Python module dlkernels._C: facts about this binary and this processor. The operators are registered in
// binding.cpp and reached through torch.ops.dlkernels once this module is loaded.
//
// No torch header here: torch/extension.h alone costs half a minute and 1.6 GB.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "kernels/cpu/isa/isa.h"
#include "planning/cpu/route.h"
#ifdef DLKERNELS_CUDA
#include "kernels/cuda/gemm/product.h"
#endif

namespace py = pybind11;

namespace {

// What setup.py decided (the macros) and what the compiler knows, as one dict:
// torch "2.13.0+cpu", cuda "13.0" or None, cuda_archs "8.0+PTX;9.0a" or None, compiler, cxx_standard, openmp, sanitize.
py::dict build_config() {
  py::dict d;
  d["torch"] = DLKERNELS_TORCH;
#ifdef DLKERNELS_CUDA
  d["cuda"] = DLKERNELS_CUDA;
  d["cuda_archs"] = DLKERNELS_CUDA_ARCHS;
#else
  d["cuda"] = py::none();
  d["cuda_archs"] = py::none();
#endif
#ifdef __clang__
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
#ifdef _OPENMP
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
#ifdef DLKERNELS_SANITIZE
  d["sanitize"] = DLKERNELS_SANITIZE;
#else
  d["sanitize"] = py::none();
#endif
  return d;
}

// Instruction sets that the processor has and the operating system saves on a context switch.
py::dict cpu_features() {
  const dlk::cpu::CpuFeatures& cpu = dlk::cpu::cpu_features();
  py::dict d;
  d["avx2"] = cpu.avx2;
  d["avx512"] = cpu.avx512;
  d["avx512_bf16"] = cpu.avx512_bf16;
  d["amx"] = cpu.amx;
  d["amx_fp16"] = cpu.amx_fp16;
  return d;
}

// Whether AMX is there and our products by it failed their self-check in this process.
bool amx_refused() { return dlk::cpu::amx_refused(); }

// Whether layers under autocast have kernels that convert f32 parameters themselves.
bool cpu_autocast() { return dlk::cpu::autocast_kernels(); }

// The kernel set in use: its instruction set ("isa") and its micro-kernel per dtype.
py::dict cpu_kernels() {
  using dlk::DType;
  const dlk::cpu::Kernels& set = dlk::cpu::kernels();
  auto ukernel = [&](DType dtype) { return set.table[static_cast<int>(dtype)].ukernel; };
  py::dict d;
  d["isa"] = set.isa;
  d["float64"] = ukernel(DType::f64);
  d["float32"] = ukernel(DType::f32);
  d["bfloat16"] = ukernel(DType::bf16);
  d["float16"] = ukernel(DType::f16);
  return d;
}

int dtype_index(const std::string& dtype) {  // a DType
  const char* const dtypes[] = {"float64", "float32", "bfloat16", "float16"};
  int index = 0;
  while (index < 4 && dtype != dtypes[index]) ++index;
  if (index == 4) throw py::type_error("expected float64, float32, bfloat16 or float16, got " + dtype);
  return index;
}

// Rows of dlkernels.functional.Explanation for y = act(x · weightᵀ), x [m, k], weight [n, k]: the decision that the ops
// take, asked here without running them.
// `in_bf16`: torch lets f32 products run in bf16. `autocast`: by the kernels that convert f32 parameters themselves.
py::list explain(int64_t m, int64_t n, int64_t k, const std::string& dtype, bool x_contiguous, bool weight_contiguous,
                 bool in_bf16, bool autocast) {
  using namespace dlk;
  const int index = dtype_index(dtype);

  py::list rows;
  auto add = [&](const char* name, Op op, bool contiguous) {
    const cpu::Route route = autocast ? cpu::autocast_route(op, {m, n, k}, contiguous)
                                      : cpu::route(op, {m, n, k}, static_cast<DType>(index), contiguous);
    const bool sliced = op == Op::wgrad && route.path == cpu::Path::packed;
    const bool striped = op == Op::wgrad && route.path == cpu::Path::few_columns;
    py::dict row;
    row["op"] = name;
    row["path"] = cpu::name(route.path);
    const char* rounded = cpu::kernels().f32_in_bf16.ukernel;
    const bool rounds = in_bf16 && dtype == "float32" && route.path == cpu::Path::packed && rounded;
    row["kernel"] = autocast ? cpu::kernels().autocast.ukernel : rounds ? rounded : cpu::kernels().table[index].ukernel;
    row["splits"] = sliced ? cpu::gemm_splits(n, k, m) : striped ? static_cast<int>(cpu::column_slices(m)) : 1;
    row["why"] = route.why;
    rows.append(row);
  };
  add("forward", Op::forward, x_contiguous && weight_contiguous);
  add("dgrad", Op::dgrad, weight_contiguous);
  add("wgrad", Op::wgrad, x_contiguous);
  return rows;
}

// In how many slices of rows the chain kernels take layers of these [m, n, k], and their micro-kernel; 0: layer by layer.
py::tuple explain_fused_mlp(const std::vector<std::array<int64_t, 3>>& layers, const std::string& dtype) {
  using namespace dlk;
  std::vector<Shape> shapes;
  for (const auto& [m, n, k] : layers) shapes.push_back({m, n, k});
  const int index = dtype_index(dtype);
  return py::make_tuple(cpu::fused_mlp_slices(shapes, static_cast<DType>(index)), cpu::kernels().table[index].ukernel);
}

#ifdef DLKERNELS_CUDA
// (address, row stride, column stride) of a 2-D view, strides in elements.
using PyView = std::array<int64_t, 3>;

// As explain(), on the current device, of compute capability `arch` (90 for 9.0). `tf32`: torch lets f32 products run in
// TF32.
py::list explain_cuda(int64_t m, int64_t n, int64_t k, const std::string& dtype, const PyView& x, const PyView& weight,
                      bool tf32, int arch) {
  using namespace dlk;
  const DType type = static_cast<DType>(dtype_index(dtype));
  auto view = [](const PyView& v) { return View{reinterpret_cast<const void*>(v[0]), v[1], v[2]}; };
  const View dz = {nullptr, n, 1};
  const bool hopper = arch == 90 && cuda::hopper_available();
  py::list rows;
  auto add = [&](const char* name, Op op, const View& left, const View& right) {
    const cuda::Route route = cuda::route_of(op, {m, n, k}, type, left, right, tf32, arch, hopper);
    py::dict row;
    row["op"] = name;
    row["path"] = cuda::name(route.path);
    row["kernel"] = cuda::kernel(route.path, type);
    row["splits"] = cuda::splits_of(route.path, op, {m, n, k}, type);
    row["why"] = cuda::explained(route);
    rows.append(row);
  };
  add("forward", Op::forward, view(x), view(weight));
  add("dgrad", Op::dgrad, dz, view(weight));
  add("wgrad", Op::wgrad, dz, view(x));
  return rows;
}

// In how many slices of rows backward's chain kernels take layers of these [m, n, k] on the current device; 0: layer by
// layer.
int explain_fused_mlp_cuda(const std::vector<std::array<int64_t, 3>>& layers, const std::string& dtype) {
  using namespace dlk;
  std::vector<FusedMlpLayer> described;
  for (const auto& [m, n, k] : layers) {
    described.emplace_back();
    described.back().n = n, described.back().k = k;
  }
  FusedMlp p{};
  p.rows = layers.at(0)[0];
  p.layers = static_cast<int>(layers.size());
  p.layer = described.data();
  const DType type = static_cast<DType>(dtype_index(dtype));
  return cuda::fused_mlp_takes(p, type) ? cuda::fused_mlp_slices(p, type) : 0;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlkernels: compiled operators (torch.ops.dlkernels) and facts about this build";
  m.def("build_config", &build_config, "What this binary was built from and for.");
  m.def("cpu_features", &cpu_features, "Instruction sets usable on this machine.");
  m.def("amx_refused", &amx_refused, "Whether AMX is there and our products by it failed their self-check.");
  m.def("cpu_kernels", &cpu_kernels, "The CPU kernel set in use: its instruction set and its micro-kernel per dtype.");
  m.def("cpu_autocast", &cpu_autocast, "Whether layers under bfloat16 autocast convert float32 parameters themselves.");
  m.def("explain", &explain, "Which path each product of a layer takes on CPU, and why.", py::arg("m"), py::arg("n"),
        py::arg("k"), py::arg("dtype"), py::arg("x_contiguous"), py::arg("weight_contiguous"), py::arg("in_bf16"),
        py::arg("autocast"));
  m.def("explain_fused_mlp", &explain_fused_mlp,
        "Slices and micro-kernel of the chain kernels for these layers; 0 slices: not.", py::arg("layers"),
        py::arg("dtype"));
#ifdef DLKERNELS_CUDA
  m.def("explain_cuda", &explain_cuda, "Which path each product of a layer takes on CUDA, and why.", py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("tf32"),
        py::arg("arch"));
  m.def("explain_fused_mlp_cuda", &explain_fused_mlp_cuda, "Slices of the chain kernels for these layers; 0: not.",
        py::arg("layers"), py::arg("dtype"));
  m.attr("cuda_paths") =
      py::make_tuple("simt", "mma", "hopper", "cublas", "fused_mlp");  // values of DLKERNELS_CUDA_GEMM
#endif
}
