// What every launcher needs: from dtype to element type, grid sizes, and a launch that reports its status.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "primitives.cuh"

namespace dlk::cuda {

DLK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels walk their work in strides of the grid, so a grid larger than the hardware's is only cut short.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

// Calls f with an element of the type: f(T{}).
template <class F>
cudaError_t with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(F16{});
  }
  return cudaErrorInvalidValue;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t dynamic_shared, cudaStream_t stream,
                   Args... args) {
  if (dynamic_shared > 48 * 1024) {  // more than every device gives unasked
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace dlk::cuda
