// The features of this CPU, and the kernel set that they select.
#pragma once

#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16, amx, amx_fp16;  // amx: tiles of bf16, and the operating system lets us use them
};

const CpuFeatures& cpu_features();

// The set in use. Throws std::runtime_error when DLKERNELS_CPU_ISA names a set that is unknown or unusable here.
const Kernels& kernels();

// True if DLKERNELS_CPU_ISA is set.
bool isa_capped();

// True if this process may use AMX but our products by it came out wrong, so that the next set is in use.
bool amx_refused();

}  // namespace dlk::cpu
