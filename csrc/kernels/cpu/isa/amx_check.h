// Two checks before the AMX kernels are chosen (isa.cpp): AMX may be used, and it multiplies correctly. Each runs once.
#pragma once

#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

// Ask the operating system for the right to use tiles, and return whether it was given. False on systems other than
// Linux. Call it only on a processor that has tiles.
bool amx_permitted();

// Return whether `gemm` gives the exact products of small integers in bf16.
bool multiplies_exactly(void (*gemm)(const Gemm&, const Parallel&));

}  // namespace dlk::cpu
