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

// While one exists, this thread may make calls that a capture forbids, such as those that load a kernel.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // of the capture, while this exists
};

// Load a kernel to the current device, and permit its blocks to use all shared memory of a block; done once per kernel
// and device. Otherwise the driver would load a kernel at its first launch, which may be in a capture. The permission is
// not set to the need of one launch, because host threads that launch the kernel with different sizes would overwrite
// each other's setting.
inline cudaError_t prepare(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  DeviceFacts device;
  cudaError_t status = device_facts(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({kernel, device.index})) return cudaSuccess;
  const RelaxedCapture relaxed;
  cudaFuncAttributes own{};
  status = cudaFuncGetAttributes(&own, kernel);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  device.most_shared - static_cast<int>(own.sharedSizeBytes));
  if (status == cudaSuccess) prepared.insert({kernel, device.index});
  return status;
}

// Launch a kernel and return the status of the launch. Arguments are converted to the types of the kernel's parameters.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t dynamic_shared, cudaStream_t stream,
                   Args... args) {
  const cudaError_t status = prepare(reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace dlk::cuda
