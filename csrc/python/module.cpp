// The Python module dlkernels._C: facts about this binary and this processor. The operators are registered in
// binding.cpp and reached through torch.ops.dlkernels once this module is loaded.
//
// No torch header here: torch/extension.h alone costs half a minute and 1.6 GB.

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/cpu/isa/isa.h"
#include "planning/cpu/machine.h"
#include "python/calls.h"
#include "python/decided.h"
#include "python/explain.h"
#include "python/names.h"
#include "python/routes.h"
#include "python/steps.h"
#include "python/training.h"

namespace py = pybind11;

namespace {

// Decisions of setup.py (the macros) and facts that the compiler knows, as one dict:
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

// True where AMX is there and our products by it failed their self-check in this process.
bool amx_refused() { return dlk::cpu::amx_refused(); }

// True where layers under autocast have kernels that convert f32 parameters themselves.
bool cpu_autocast() { return dlk::cpu::this_machine(1, false).converts_parameters(); }

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

// Run `steps` steps of multiply-adds on the registers of the calling thread, without the interpreter's lock. Return
// their operations.
int64_t peak_loop(const std::string& dtype, int64_t steps) {
  const auto run = dlk::cpu::kernels().table[static_cast<int>(dlk::python::dtype_named(dtype))].peak_loop;
  const py::gil_scoped_release unlocked;
  return run(steps);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlkernels: compiled operators (torch.ops.dlkernels) and facts about this build";
  m.def("build_config", &build_config, "The torch, CUDA and compiler that this binary was built with.");
  m.def("cpu_features", &cpu_features, "Instruction sets usable on this machine.");
  m.def("amx_refused", &amx_refused, "True where AMX is there and our products by it failed their self-check.");
  m.def("cpu_kernels", &cpu_kernels, "The CPU kernel set in use: its instruction set and its micro-kernel per dtype.");
  m.def("cpu_autocast", &cpu_autocast,
        "True where layers under bfloat16 autocast convert float32 parameters themselves.");
  m.def("peak_loop", &peak_loop, py::arg("dtype"), py::arg("steps"),
        "Multiply on the registers of the calling thread; return the operations. For the benchmark.");
  dlk::python::add_calls(m);
  dlk::python::add_decided(m);
  dlk::python::add_steps(m);
  dlk::python::add_explain(m);
  dlk::python::add_routes(m);
  dlk::python::add_training(m);
}
