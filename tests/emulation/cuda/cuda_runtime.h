// Replaces CUDA's header of this name: with it g++ compiles kernels for the host. Blocks run one after the other, and
// the threads of a block are fibers (fibers.h). It has what csrc/kernels/cuda uses, and no more.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <utility>

#include "fibers.h"
#include "guarded.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __grid_constant__

using std::max;
using std::min;

inline double normcdf(double v) { return 0.5 * std::erfc(v * -0.70710678118654752440); }
inline float normcdff(float v) { return 0.5f * std::erfc(v * -0.70710678f); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorStreamCaptureUnsupported = 900,
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace cuda_emulation {
// The properties of the device that launchers ask for. It is an H100 unless a test changes it.
struct Device {
  int major = 9, minor = 0, processors = 132;
  int most_shared = 227 * 1024, most_threads = 1024;  // of a block
};
inline Device device;
inline int64_t launches = 0;
inline Guarded dynamic_shared;
// The dynamic shared memory that blocks of a kernel may have: 48 KiB minus the kernel's own arrays, until a launcher
// asks for more. The size of these arrays is not known here; it is 1 KiB in kernels that have both (make cuda-check
// prints it).
constexpr int kSharedUnasked = 47 * 1024;
inline std::map<std::pair<const void*, int>, int> shared_allowed;  // of kernel and device
}  // namespace cuda_emulation

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
// A device with other properties is another device.
inline cudaError_t cudaGetDevice(int* index) {
  static std::map<std::array<int, 4>, int> known;
  const auto& d = cuda_emulation::device;
  const auto [place, added] =
      known.insert({{d.major, d.minor, d.processors, d.most_shared}, static_cast<int>(known.size())});
  return *index = place->second, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = cuda_emulation::device;
  const int values[] = {device.processors, device.most_shared, device.major, device.minor};
  *value = values[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_emulation::device.most_shared) return cudaErrorInvalidValue;
  cuda_emulation::shared_allowed[{kernel, cuda_emulation::device.most_shared}] = bytes;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
  size_t sharedSizeBytes;
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
namespace cuda_emulation {
inline bool capturing = false;  // a stream is being captured
inline cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
}  // namespace cuda_emulation
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, cuda_emulation::capture_mode), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  if (cuda_emulation::capturing && cuda_emulation::capture_mode != cudaStreamCaptureModeRelaxed)
    return cudaErrorStreamCaptureUnsupported;  // it loads the kernel
  *attributes = {cuda_emulation::device.most_threads, 0};
  return cudaSuccess;
}

inline void __syncthreads() { cuda_emulation::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_emulation::exchange(0, "syncwarp"); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return cuda_emulation::exchange(v, "shfl_xor")[(threadIdx.x % cuda_emulation::kWarp) ^ mask];
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  using namespace cuda_emulation;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!grid.x || grid.y != 1 || !grid.z || grid.z > 65535 || !block.x || block.x > 1024)
    return cudaErrorInvalidConfiguration;
  const auto allowed = shared_allowed.find({reinterpret_cast<const void*>(kernel), device.most_shared});
  const int most = allowed == shared_allowed.end() ? kSharedUnasked : allowed->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(std::min(most, device.most_shared))) return cudaErrorInvalidValue;
  const std::function<void()> thread = [&] { kernel(static_cast<Params>(args)...); };
  body = &thread;
  gridDim = grid, blockDim = block;
  ++launches;
  std::mt19937 lot(1);
  const size_t shared_bytes = (config->dynamicSmemBytes + 127) / 128 * 128;
  const bool legal = without_fault([&] {
    dynamic_shared.allocate(shared_bytes);
    races::shared_memory(dynamic_shared.data, shared_bytes);
    races::begin_launch();
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, 0, z);
        if (shared_bytes) std::memset(dynamic_shared.data, 0xff, shared_bytes);
        run_block(block.x, lot, [](unsigned t) { threadIdx = dim3(t, 0, 0); });
      }
  });
  races::begin_quiet();
  return legal ? cudaSuccess : cudaErrorIllegalAddress;
}
