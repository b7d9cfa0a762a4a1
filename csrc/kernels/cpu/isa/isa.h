// The features of this processor, and the kernel set that they select.
#pragma once

#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

enum class Maker { amd, intel, other };  // of the processor: libraries choose their code by it

struct CpuFeatures {
  Maker maker;
  bool avx2, avx512, avx512_bf16, amx, amx_fp16;  // amx: it has bf16 tiles, and the operating system lets us use them
};

const CpuFeatures& cpu_features();

// Return the set in use. Throws std::runtime_error when DLKERNELS_CPU_ISA names a set that is unknown or unusable here.
const Kernels& kernels();

// Return whether DLKERNELS_CPU_ISA is set.
bool isa_capped();

// Return whether this process may use AMX but our AMX products came out wrong, so that the next best set is in use.
bool amx_refused();

}  // namespace dlk::cpu
