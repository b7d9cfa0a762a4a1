// Adds what the Hopper launcher needs to the replacement of this header in tests/emulation/cuda.
#pragma once

#include <initializer_list>

#include "../cuda/cuda_runtime.h"

constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);

template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return cuda_emulation::exchange(v, "shfl")[static_cast<unsigned>(lane)];
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);
