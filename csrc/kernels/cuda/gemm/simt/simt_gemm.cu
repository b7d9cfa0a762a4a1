// The launcher of simt_gemm.cuh: the switch from the dtype to a kernel, and the k-slices.
#include "kernels/cuda/gemm/simt/simt_gemm.cuh"
#include "kernels/cuda/gemm/slices.h"

#include <algorithm>

namespace dlk::cuda {
namespace {

template <class T>
cudaError_t run(const Gemm& p, cudaStream_t stream) {
  using Traits = SimtTraits<T>;
  const int64_t tiles = ceil_div(p.m, Traits::kTileM) * std::max<int64_t>(1, ceil_div(p.n, Traits::kTileN));
  const dim3 grid(grid_of(tiles), 1, static_cast<unsigned>(p.splits));
  cudaError_t status = launch(simt_gemm_kernel<Traits>, grid, Traits::kThreads, 0, stream, p);
  if (status != cudaSuccess || p.splits == 1) return status;

  if (p.n > 0) status = splitk_reduce(p, stream);
  if (status != cudaSuccess || !p.row_sum) return status;
  return sum_slices(p.dtype, static_cast<const T*>(p.partials) + p.splits * p.m * p.n, p.splits, p.m, p.row_sum,
                    stream);
}

}  // namespace

cudaError_t simt_gemm(const Gemm& p, cudaStream_t stream) {
  if (p.m == 0 || (p.n == 0 && !p.row_sum)) return cudaSuccess;
  if (is_16_bit(p.dtype) || p.column_sum || p.mask) return cudaErrorInvalidValue;
  return p.dtype == DType::f64 ? run<double>(p, stream) : run<float>(p, stream);
}

}  // namespace dlk::cuda
