// What this CPU offers and which kernel set that selects.
#pragma once

#include "kernels.h"

namespace dlk::cpu {

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16, amx_bf16, amx_fp16;
};

const CpuFeatures& cpu_features();

// The set in use. Throws std::runtime_error when DLKERNELS_CPU_ISA names a set that is unknown or unusable here.
const Kernels& kernels();

// Whether DLKERNELS_CPU_ISA is set.
bool isa_capped();

}  // namespace dlk::cpu
