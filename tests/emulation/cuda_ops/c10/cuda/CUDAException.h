// Replaces c10's header of this name.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call)                                                                 \
  do {                                                                                       \
    const cudaError_t status = (call);                                                       \
    TORCH_CHECK(status == cudaSuccess, "CUDA error ", static_cast<int>(status), ": " #call); \
  } while (false)
