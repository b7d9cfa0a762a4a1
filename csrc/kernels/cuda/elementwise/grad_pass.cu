// The launcher of grad_pass.cuh: how columns and rows are cut, and the switch from the dtype to a kernel.
#include "kernels/cuda/elementwise/grad_pass.cuh"

#include <algorithm>

namespace dlk::cuda {
namespace {

// Rows are cut for this many blocks, as many as the largest devices run at once: by the shape alone, so that another
// device adds up in the same order.
constexpr int64_t kBlocks = 512;
// Up to this many rows are one slice, because a second launch would cost more than it saves. A block takes few columns
// then, so that there are enough blocks.
constexpr int64_t kFewRows = 512;
constexpr int kFewLanes = 4;

int width_of(int64_t n, DType dtype) {
  const int pack = dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8;
  return n % pack == 0 ? pack : 1;
}

GradPassCut cut_of(const GradPass& p) {
  const int64_t runs = p.n / width_of(p.n, p.dtype);
  GradPassCut cut{1, 1, 1, 1};
  const bool few = p.m <= kFewRows;
  while (cut.lanes < (few ? kFewLanes : 32) && cut.lanes < runs) cut.lanes *= 2;
  const int64_t step = kGradPassThreads / cut.lanes, steps = std::max<int64_t>(1, ceil_div(p.m, step));
  cut.tiles = ceil_div(runs, cut.lanes);
  cut.slices = few ? 1 : std::min(std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, cut.tiles)), steps);
  cut.rows = ceil_div(steps, cut.slices) * step;
  cut.slices = std::max<int64_t>(1, ceil_div(p.m, cut.rows));
  return cut;
}

template <class T>
cudaError_t run(const GradPass& p, cudaStream_t stream) {
  const GradPassCut cut = cut_of(p);
  const bool wide = width_of(p.n, p.dtype) > 1;
  const cudaError_t status = launch(wide ? grad_pass_kernel<T, kPack<T>> : grad_pass_kernel<T, 1>,
                                    dim3(grid_of(cut.tiles * cut.slices)), kGradPassThreads, 0, stream, p, cut);
  if (status != cudaSuccess || !p.dbias || cut.slices == 1) return status;
  return p.output_mode == OutputMode::cast ? sum_slices<T>(p.partials, cut.slices, p.n, p.dbias, stream)
                                           : sum_slices<Acc<T>>(p.partials, cut.slices, p.n, p.dbias, stream);
}

}  // namespace

int64_t grad_pass_partials(const GradPass& p) {
  const int64_t slices = cut_of(p).slices;
  return p.dbias && slices > 1 ? slices * p.n : 0;
}

cudaError_t grad_pass(const GradPass& p, cudaStream_t stream) {
  if (p.n == 0 || (!p.dz && !p.dbias) || (p.m == 0 && !p.dbias)) return cudaSuccess;
  if (p.output_mode == OutputMode::accumulate) return cudaErrorInvalidValue;
  return with_dtype(p.dtype, [&](auto t) { return run<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
