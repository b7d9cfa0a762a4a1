// guarded.h for a GPU. The host's copy is what tests write and read; run() carries it to the device and back.
//
// Memory of the device cannot be forbidden. A band on each side is filled with 0xff and must still hold it after every
// call, so writes past the ends are seen here. With DLKERNELS_EXACT_MEMORY there is no band behind: the allocation ends
// with the last byte, so that compute-sanitizer sees reads too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace cuda_on_device {

struct Guarded;
inline std::vector<Guarded*> live;

struct Guarded {
  static constexpr size_t kBand = 256;
  size_t bytes, before, behind;  // as on the host, the first byte has the alignment of `bytes`
  unsigned char* device = nullptr;
  std::vector<unsigned char> host;  // with its bands

  explicit Guarded(size_t size)
      : bytes(size),
        before(kBand + (kBand - size % kBand) % kBand),
        behind(std::getenv("DLKERNELS_EXACT_MEMORY") ? 0 : kBand),
        host(before + bytes + behind, 0xff) {
    if (cudaMalloc(&device, host.size()) != cudaSuccess) device = nullptr;
    live.push_back(this);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    cudaFree(device);
    live.erase(std::find(live.begin(), live.end(), this));
  }

  cudaError_t upload() const { return cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice); }
  cudaError_t download() {
    const cudaError_t status = cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost);
    if (status != cudaSuccess) return status;
    const auto untouched = [](unsigned char byte) { return byte == 0xff; };
    const auto end = host.end() - static_cast<ptrdiff_t>(behind);
    const bool both = std::all_of(host.begin(), host.begin() + static_cast<ptrdiff_t>(before), untouched) &&
                      std::all_of(end, host.end(), untouched);
    return both ? cudaSuccess : cudaErrorIllegalAddress;
  }
};

// Return the status of the launch, of the kernels, or that of a write past an end.
template <class Launch>
int run(Launch&& launch) {
  for (const Guarded* memory : live)
    if (const cudaError_t status = memory->upload(); status != cudaSuccess) return status;
  cudaError_t status = static_cast<cudaError_t>(launch());
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  for (Guarded* memory : live) {
    const cudaError_t back = memory->download();
    if (status == cudaSuccess) status = back;
  }
  return status;
}

}  // namespace cuda_on_device
