// A product or a pass may be cut in slices. These launchers add the slices up afterwards.
#pragma once

#include "kernels/cuda/kernels.h"

namespace dlk::cuda {

// C = epilogue(Σ over slices of p.partials [splits, m, n]).
cudaError_t splitk_reduce(const Gemm& p, cudaStream_t stream);

// out[i] = Σ over slices of partials[slice, i], of `count` accumulators, in a fixed order. dtype: of out.
cudaError_t sum_slices(DType dtype, const void* partials, int64_t slices, int64_t count, void* out,
                       cudaStream_t stream);

}  // namespace dlk::cuda
