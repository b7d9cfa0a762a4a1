// A stand-in for CUDA's header of this name: g++ compiles kernels for the host with it, one block at a time, its
// threads as fibers that switch at __syncthreads(). Between two barriers the fibers run one after another in a
// shuffled order, so that a missing barrier shows as a wrong answer. Enough for csrc/cuda, and no more.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace cuda_on_host {

constexpr size_t kStack = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};  // not cleared: pages never touched cost nothing
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;

inline void fiber_main() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run_block(unsigned threads, std::mt19937& shuffle) {
  static std::vector<Fiber> fibers;  // kept, for their stacks
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t done = 0; done < threads;) {
    std::shuffle(order.begin(), order.end(), shuffle);
    for (const unsigned thread : order) {
      current = &fibers[thread];
      threadIdx = dim3(thread, 0, 0);
      swapcontext(&scheduler, &current->context);
    }
    done = std::count_if(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.done; });
    if (done != 0 && done != threads) {
      std::fprintf(stderr, "cuda_on_host: %zu of %u threads ended while the others wait at a barrier\n", done, threads);
      std::abort();
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { swapcontext(&cuda_on_host::current->context, &cuda_on_host::scheduler); }

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!grid.x || grid.y != 1 || !grid.z || grid.z > 65535 || !block.x || block.x > 1024)
    return cudaErrorInvalidConfiguration;
  const std::function<void()> thread = [&] { kernel(static_cast<Params>(args)...); };
  cuda_on_host::body = &thread;
  gridDim = grid, blockDim = block;
  std::mt19937 shuffle(1);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, 0, z);
      cuda_on_host::run_block(block.x, shuffle);
    }
  return cudaSuccess;
}
