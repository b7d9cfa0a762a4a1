// The Python module dlkernels._C: facts about this binary and this processor. The operators are registered in
// binding.cpp and reached through torch.ops.dlkernels once this module is loaded.
//
// No torch header here: torch/extension.h alone costs half a minute and 1.6 GB.

#include <string>

#include "kernels/cpu/isa/isa.h"
#include "planning/cpu/machine.h"
#include "python/decided.h"
#include "python/explain.h"
#include "python/names.h"
#include "python/objects.h"
#include "python/routes.h"
#include "python/training.h"

namespace dlk::python {
namespace {

// Decisions of setup.py (the macros) and facts that the compiler knows, as one dict:
// torch "2.13.0+cpu", cuda "13.0" or None, cuda_archs "8.0+PTX;9.0a" or None, compiler, cxx_standard, openmp, sanitize.
Dict build_config() {
  Dict d;
  d.set("torch", DLKERNELS_TORCH);
#ifdef DLKERNELS_CUDA
  d.set("cuda", DLKERNELS_CUDA);
  d.set("cuda_archs", DLKERNELS_CUDA_ARCHS);
#else
  d.set("cuda", Object::borrow(Py_None));
  d.set("cuda_archs", Object::borrow(Py_None));
#endif
#ifdef __clang__
  d.set("compiler", "clang " __clang_version__);
#else
  d.set("compiler", "gcc " __VERSION__);
#endif
  d.set("cxx_standard", static_cast<int>(__cplusplus / 100 % 100));
#ifdef _OPENMP
  d.set("openmp", _OPENMP);
#else
  d.set("openmp", Object::borrow(Py_None));
#endif
#ifdef DLKERNELS_SANITIZE
  d.set("sanitize", DLKERNELS_SANITIZE);
#else
  d.set("sanitize", Object::borrow(Py_None));
#endif
  return d;
}

// Instruction sets that the processor has and the operating system saves on a context switch.
Dict cpu_features() {
  const cpu::CpuFeatures& cpu = cpu::cpu_features();
  Dict d;
  d.set("avx2", cpu.avx2);
  d.set("avx512", cpu.avx512);
  d.set("avx512_bf16", cpu.avx512_bf16);
  d.set("amx", cpu.amx);
  d.set("amx_fp16", cpu.amx_fp16);
  return d;
}

// True where AMX is there and our products by it failed their self-check in this process.
bool amx_refused() { return cpu::amx_refused(); }

// True where layers under autocast have kernels that convert f32 parameters themselves.
bool cpu_autocast() { return cpu::this_machine(1, false).converts_parameters(); }

// The kernel set in use: its instruction set ("isa") and its micro-kernel per dtype.
Dict cpu_kernels() {
  const cpu::Kernels& set = cpu::kernels();
  auto ukernel = [&](DType dtype) { return set.table[static_cast<int>(dtype)].ukernel; };
  Dict d;
  d.set("isa", set.isa);
  d.set("float64", ukernel(DType::f64));
  d.set("float32", ukernel(DType::f32));
  d.set("bfloat16", ukernel(DType::bf16));
  d.set("float16", ukernel(DType::f16));
  return d;
}

// Run `steps` steps of multiply-adds on the registers of the calling thread, without the interpreter's lock. Return
// their operations.
int64_t peak_loop(const std::string& dtype, int64_t steps) {
  const auto run = cpu::kernels().table[static_cast<int>(dtype_named(dtype))].peak_loop;
  const Unlocked unlocked;
  return run(steps);
}

constexpr std::array<const char*, 2> kPeakLoop = {"dtype", "steps"};

PyMethodDef kFunctions[] = {
    function<kNoNames, &build_config>("build_config", "The torch, CUDA and compiler that this binary was built with."),
    function<kNoNames, &cpu_features>("cpu_features", "Instruction sets usable on this machine."),
    function<kNoNames, &amx_refused>("amx_refused",
                                     "True where AMX is there and our products by it failed their self-check."),
    function<kNoNames, &cpu_kernels>("cpu_kernels",
                                     "The CPU kernel set in use: its instruction set and its micro-kernel per dtype."),
    function<kNoNames, &cpu_autocast>(
        "cpu_autocast", "True where layers under bfloat16 autocast convert float32 parameters themselves."),
    function<kPeakLoop, &peak_loop>(
        "peak_loop", "Multiply on the registers of the calling thread; return the operations. For the benchmark."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_C",
                       "dlkernels: compiled operators (torch.ops.dlkernels) and facts about this build",
                       -1,
                       kFunctions,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  return guarded([] {
    Object module = made(PyModule_Create(&kModule));
    add_decided(module.ptr());
    add_explain(module.ptr());
    add_routes(module.ptr());
    add_training(module.ptr());
    return module.release();
  });
}

}  // namespace dlk::python
