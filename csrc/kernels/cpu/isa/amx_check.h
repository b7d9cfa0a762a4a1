// Two questions that are asked once, before the AMX kernels are taken: may AMX be used here, and does it multiply right?
#pragma once

#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

// Asks the operating system for the tiles (Linux; elsewhere no). Only for a processor that has them.
bool amx_permitted();

// True if `gemm` gives the exact products of small integers in bf16.
bool multiplies_exactly(void (*gemm)(const Gemm&, const Parallel&));

}  // namespace dlk::cpu
