// The sum of slices, by a block.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

// out[i] = Σ over slices of partials[slice, i], in a fixed order: 8 threads share an output, and each sums every eighth
// slice.
constexpr int kSumOutputs = 32, kSumSharers = 8;
template <class T>
DLK_DEVICE void sum_slices_block(const Acc<T>* partials, int64_t slices, int64_t count, T* out) {
  __shared__ double sums[kSumSharers][kSumOutputs];
  const int output = threadIdx.x % kSumOutputs, sharer = threadIdx.x / kSumOutputs;
  for (int64_t first = int64_t{blockIdx.x} * kSumOutputs; first < count; first += int64_t{gridDim.x} * kSumOutputs) {
    const int64_t i = first + output;
    double sum = 0;
    if (i < count)
      for (int64_t slice = sharer; slice < slices; slice += kSumSharers) sum += partials[slice * count + i];
    sums[sharer][output] = sum;
    __syncthreads();
    if (sharer == 0 && i < count) {
      for (int s = 1; s < kSumSharers; ++s) sum += sums[s][output];
      narrow(static_cast<Acc<T>>(sum), out + i);
    }
    __syncthreads();
  }
}

}  // namespace dlk::cuda
