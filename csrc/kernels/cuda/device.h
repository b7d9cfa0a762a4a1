// Facts about the current device, asked once for each device.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

namespace dlk::cuda {

struct DeviceFacts {
  int index = -1;
  int arch = 0;         // compute capability, 90 for 9.0
  int processors = 0;   // SMs
  int most_shared = 0;  // bytes of shared memory that a block may take
};

inline cudaError_t device_facts(DeviceFacts* out) {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  int index = 0;
  cudaError_t status = cudaGetDevice(&index);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return *out = found->second, cudaSuccess;
  DeviceFacts facts{index};
  int major = 0, minor = 0;
  for (const auto& [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&facts.processors, cudaDevAttrMultiProcessorCount},
        std::pair{&facts.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}})
    if ((status = cudaDeviceGetAttribute(value, attribute, index)) != cudaSuccess) return status;
  facts.arch = 10 * major + minor;
  known[index] = *out = facts;
  return cudaSuccess;
}

// The number of SMs, 1 if the device does not answer: then no launch will succeed either.
inline int processors() {
  DeviceFacts facts;
  return device_facts(&facts) == cudaSuccess ? facts.processors : 1;
}

}  // namespace dlk::cuda
