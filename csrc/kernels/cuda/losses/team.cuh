// Sums and maxima over neighbouring threads.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// A team of kSize neighbouring threads that combine their values: lanes of a warp, or a whole block of several warps.
template <int kSize>
struct Team {
  static_assert(kSize > 0 && (kSize <= 32 ? 32 % kSize : kSize % 32) == 0);
  static constexpr int kLanes = kSize < 32 ? kSize : 32, kWarps = kSize / kLanes;

  // Combine v of all threads by f, in a fixed order. Every thread gets the result.
  template <class V, class F>
  DLK_DEVICE static V combined(V v, F&& f) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) v = f(v, __shfl_xor_sync(0xffffffffu, v, other));
    if constexpr (kWarps > 1) {
      __shared__ V warp_values[kWarps];
      if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = v;
      __syncthreads();
      v = warp_values[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) v = f(v, warp_values[warp]);
      __syncthreads();  // before the next call overwrites it
    }
    return v;
  }
  template <class V>
  DLK_DEVICE static V sum(V v) {
    return combined(v, [](V a, V b) { return a + b; });
  }
  // A NaN is never the maximum.
  template <class V>
  DLK_DEVICE static V max(V v) {
    return combined(v, [](V a, V b) { return b > a ? b : a; });
  }
};

}  // namespace dlk::cuda
