// The launcher of grad_pass.cuh: the switch from the dtype to a kernel.
#include "kernels/cuda/elementwise/grad_pass.cuh"
#include "kernels/cuda/gemm/slices.h"

namespace dlk::cuda {
namespace {

template <class T>
cudaError_t run(const GradPass& p, cudaStream_t stream) {
  const GradPassCut cut = cut_of(p.m, p.n, p.dtype);
  const bool wide = width_of(p.n, p.dtype) > 1;
  const cudaError_t status = launch(wide ? grad_pass_kernel<T, kPack<T>> : grad_pass_kernel<T, 1>,
                                    dim3(grid_of(cut.tiles * cut.slices)), kGradPassThreads, 0, stream, p, cut);
  if (status != cudaSuccess || !p.dbias || cut.slices == 1) return status;
  const DType accumulator = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  return sum_slices(p.output_mode == OutputMode::cast ? p.dtype : accumulator, p.partials, cut.slices, p.n, p.dbias,
                    stream);
}

}  // namespace

int64_t grad_pass_partials(const GradPass& p) {
  const int64_t slices = cut_of(p.m, p.n, p.dtype).slices;
  return p.dbias && slices > 1 ? slices * p.n : 0;
}

cudaError_t grad_pass(const GradPass& p, cudaStream_t stream) {
  if (p.n == 0 || (!p.dz && !p.dbias) || (p.m == 0 && !p.dbias)) return cudaSuccess;
  if (p.output_mode == OutputMode::accumulate) return cudaErrorInvalidValue;
  return with_dtype(p.dtype, [&](auto t) { return run<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
