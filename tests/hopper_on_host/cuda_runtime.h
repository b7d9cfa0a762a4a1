// What the Hopper launcher needs of CUDA's header of this name beyond tests/cuda_on_host: a device to ask about.
#pragma once

#include <initializer_list>

#include "../cuda_on_host/cuda_runtime.h"

#define __grid_constant__

constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};

namespace hopper_on_host {
// Three processors: a block has several tiles in turn, and blocks have different numbers of them.
struct Device {
  int major = 9, minor = 0, processors = 3, most_threads = 384;
};
inline Device device;
}  // namespace hopper_on_host

inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = hopper_on_host::device;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? device.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? device.major
                                                            : device.minor;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->maxThreadsPerBlock = hopper_on_host::device.most_threads;
  return cudaSuccess;
}

template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return cuda_on_host::exchange(v, "shfl")[static_cast<unsigned>(lane)];
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);
