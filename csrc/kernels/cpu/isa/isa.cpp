// Choose the kernel set: the best instruction set that processor and operating system offer, or the one that
// DLKERNELS_CPU_ISA names. Also the scratch memory of a thread.
#include "kernels/cpu/isa/isa.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/cpu/huge_pages.h"
#include "kernels/cpu/isa/amx_check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dlk::cpu {

extern const Kernels k_portable;
#if defined(__x86_64__)
extern const Kernels k_avx2;
extern const Kernels k_avx512;
extern const Kernels k_avx512_bf16;
extern const PackedProduct k_amx_bf16, k_amx_f32_in_bf16;
extern const FewForward k_amx_few_forward;
extern const FusedMlpKernels k_amx_fused_mlp;
extern const PackedLayer k_amx_autocast_f32_x, k_amx_autocast_bf16_x;
extern int64_t (*const k_amx_peak_loop)(int64_t);
#endif

namespace {

CpuFeatures detect() {
  CpuFeatures f{Maker::other};
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks xgetbv too: a set bit means that the operating system saves those registers
  f.maker = __builtin_cpu_is("amd") ? Maker::amd : __builtin_cpu_is("intel") ? Maker::intel : Maker::other;
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d)) f.avx2 = f.avx2 && (c & (1u << 29));  // f16c
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    const bool tiles_of_bf16 = (d & (1u << 22)) && (d & (1u << 24));
    const bool has_leaf_1 = a >= 1;
    if (has_leaf_1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
      f.avx512_bf16 = f.avx512 && (a & (1u << 5));
      f.amx = f.avx512_bf16 && tiles_of_bf16 && amx_permitted();
      f.amx_fp16 = f.amx && (a & (1u << 21));
    }
  }
#endif
  return f;
}

#if defined(__x86_64__)
// The kernels of AVX-512 BF16, with the bf16 products of more than one row and the fused MLP replaced by those of AMX. They are
// put together in this file because code compiled in ukernel_amx.cpp may hold instructions that this processor does not have.
const Kernels& amx_kernels() {
  static const Kernels set = [] {
    Kernels amx = k_avx512_bf16;
    amx.isa = "amx";
    KernelTable& bf16 = amx.table[static_cast<int>(DType::bf16)];
    bf16.ukernel = "bf16 32x32 amx";
    bf16.packed = k_amx_bf16;
    bf16.tiles_forward = k_amx_few_forward;
    bf16.fused_mlp = k_amx_fused_mlp;
    bf16.peak_loop = k_amx_peak_loop;
    amx.f32_in_bf16 = {"f32 rounded to bf16 32x32 amx", k_amx_f32_in_bf16};
    amx.autocast.ukernel = "bf16, f32 rounded to it 32x32 amx";
    amx.autocast.f32_x.packed = k_amx_autocast_f32_x;
    amx.autocast.bf16_x.packed = k_amx_autocast_bf16_x;
    return amx;
  }();
  return set;
}
#endif

struct Level {
  const Kernels* kernels;
  bool usable;
};

// The kernel set that the user asks for; empty: the best one.
std::string cap() {
  const char* text = std::getenv("DLKERNELS_CPU_ISA");
  return text ? text : "";
}

const Kernels* choose() {
  const CpuFeatures& f = cpu_features();
  const std::string wanted = cap();
  const Level levels[] = {
      // worst to best
      {&k_portable, true},
#if defined(__x86_64__)
      {&k_avx2, f.avx2},
      {&k_avx512, f.avx512},
      {&k_avx512_bf16, f.avx512_bf16},
      {&amx_kernels(), f.amx && (wanted.empty() || wanted == "amx") && multiplies_exactly(k_amx_bf16.gemm)},
#endif
  };
  const Kernels* best = nullptr;
  std::string known;
  for (const Level& level : levels) {
    known += std::string(known.empty() ? "" : ", ") + level.kernels->isa;
    if (level.usable && wanted.empty()) best = level.kernels;
    if (wanted == level.kernels->isa) {
      const bool defective = wanted == "amx" && f.amx;
      if (!level.usable)
        throw std::runtime_error("DLKERNELS_CPU_ISA=" + wanted +
                                 (defective ? " asks for kernels that failed their self-check on this CPU; unset it"
                                            : " asks for instructions this CPU does not have; unset it"));
      best = level.kernels;
    }
  }
  if (!best) throw std::runtime_error("DLKERNELS_CPU_ISA must be one of " + known + ", got '" + wanted + "'");
  return best;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

bool isa_capped() { return !cap().empty(); }

bool amx_refused() {
#if defined(__x86_64__)
  return cpu_features().amx && !isa_capped() && &kernels() != &amx_kernels();
#else
  return false;
#endif
}

void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(allocate_scratch(bytes));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace dlk::cpu
