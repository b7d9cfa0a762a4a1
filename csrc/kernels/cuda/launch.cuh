// The common parts of launchers: the switch from dtype to element type, grid sizes, and a launch that returns its
// status.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <set>
#include <utility>

#include "kernels/cuda/device.h"
#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

DLK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Return a grid of `blocks` blocks, or the largest one that the hardware takes. Kernels step through their work in
// strides of the grid, so a smaller grid still does all of it.
inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

// Call f(T{}), where T is the element type of `dtype`.
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

// The dynamic shared memory that a block may use without permission. The limit is 48 KiB, and the kernel's own arrays
// are counted in it.
constexpr size_t kSharedUnasked = 32 * 1024;

// Permit the blocks of a kernel to use all shared memory of a block on this device; done once per kernel and device.
// The permission is not set to the need of one launch, because host threads that launch the kernel with different sizes
// would overwrite each other's setting.
inline cudaError_t allow_all_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  DeviceFacts device;
  cudaError_t status = device_facts(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device.index})) return cudaSuccess;
  cudaFuncAttributes own{};
  status = cudaFuncGetAttributes(&own, kernel);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  device.most_shared - static_cast<int>(own.sharedSizeBytes));
  if (status == cudaSuccess) allowed.insert({kernel, device.index});
  return status;
}

// Launch a kernel and return the status of the launch. Arguments are converted to the types of the kernel's parameters.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t dynamic_shared, cudaStream_t stream,
                   Args... args) {
  if (dynamic_shared > kSharedUnasked) {
    const cudaError_t status = allow_all_shared(reinterpret_cast<const void*>(kernel));
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
