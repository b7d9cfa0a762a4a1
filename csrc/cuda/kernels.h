// What the CUDA kernels offer. No torch here: raw pointers and a stream in, a status out.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/kernels.h"

namespace dlk::cuda {

using cpu::Gemm;  // one description of a layer's three products for both twins
using cpu::partials_size;

// Runs p on the stream of the current device. All pointers are device memory; nothing is synchronised.
// m, n and k may be 0: sums over nothing are 0, and an empty C launches no product.
cudaError_t gemm(const Gemm& p, cudaStream_t stream);

// How many slices k is cut in, so that a small C with a long k still fills the device: a function of the shape
// alone, hence the same bits on every run. 1 for products with an epilogue.
int gemm_splits(int64_t m, int64_t n, int64_t k);

}  // namespace dlk::cuda
