// Whether AMX may be used here, and whether it multiplies right: asked once, before its kernels are taken.
#pragma once

#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

// Asks the operating system for the tiles (Linux; elsewhere no). Only for a processor that has them.
bool amx_permitted();

// Whether `gemm` gives the exact products of small integers in bf16.
bool multiplies_exactly(void (*gemm)(const Gemm&, const Parallel&));

}  // namespace dlk::cpu
