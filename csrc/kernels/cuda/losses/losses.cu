// The launchers of losses.cuh: how work is cut in blocks, how many threads share a row, and the switch from the dtype
// to a kernel.
#include "kernels/cuda/losses/losses.cuh"

#include <algorithm>

namespace dlk::cuda {
namespace {

// Launch reduce_loss_kernel.
template <class T>
cudaError_t reduce_loss(const double* sums, int64_t blocks, const double* counts, int count_blocks, double denominator,
                        void* loss, cudaStream_t stream) {
  return launch(reduce_loss_kernel<T>, dim3(1), kLossThreads, 0, stream, sums, static_cast<int>(blocks), counts,
                count_blocks, denominator, static_cast<T*>(loss));
}

template <class T, template <class...> class Loss>
cudaError_t elementwise(const ElementwiseLoss& p, cudaStream_t stream) {
  using Terms = Loss<Ops<Acc<T>>>;
  const bool wide = p.rows == 1 || p.cols % kPack<T> == 0;
  const int64_t count = p.rows * p.cols, step = kLossThreads * (wide ? kPack<T> : 1);
  const int64_t length = ceil_div(ceil_div(count, step), kLossBlocks) * step;
  const int64_t blocks = count ? ceil_div(count, length) : 0;
  cudaError_t status = cudaSuccess;
  if (blocks > 0)
    status = launch(wide ? elementwise_loss_kernel<T, Terms, kPack<T>> : elementwise_loss_kernel<T, Terms, 1>,
                    dim3(grid_of(blocks)), kLossThreads, 0, stream, p, length);
  if (status != cudaSuccess || !p.reduced) return status;
  return reduce_loss<T>(p.sums, blocks, nullptr, 0, p.divisor, p.reduced, stream);
}

// Rows up to this size are cached in shared memory. Every device has as much.
constexpr int64_t kCacheBytes = 64 * 1024;

// Launch cross_entropy_kernel, and return its number of blocks.
template <class T, int kTeam, int kPer>
cudaError_t launch_rows(const CrossEntropy& p, int64_t* blocks, cudaStream_t stream) {
  constexpr int kRows = kLossThreads / kTeam;
  *blocks = std::min<int64_t>(ceil_div(p.outer * p.inner, kRows), kLossBlocks);
  if (*blocks == 0) return cudaSuccess;
  const int64_t bytes = ceil_div(p.classes, kPack<T>) * 16;
  const bool cached = kTeam == kLossThreads && bytes <= kCacheBytes;
  return launch(cross_entropy_kernel<T, kTeam, kPer>, dim3(grid_of(*blocks)), kLossThreads,
                cached ? static_cast<size_t>(bytes) : 0, stream, p, cached);
}

// Choose how many threads share a row. Neighbouring threads read neighbouring elements: of different rows where rows
// are contiguous across, otherwise classes of one row.
template <class T>
cudaError_t cross_entropy_rows(const CrossEntropy& p, int64_t* blocks, cudaStream_t stream) {
  const bool across_rows = p.x_strides.cls != 1 && p.x_strides.inner == 1 && p.inner > 1;
  if (across_rows)
    return p.classes <= 32 ? launch_rows<T, 1, 32>(p, blocks, stream) : launch_rows<T, 1, 0>(p, blocks, stream);
  if (p.classes <= 16) return launch_rows<T, 4, 4>(p, blocks, stream);
  if (p.classes <= 64) return launch_rows<T, 16, 4>(p, blocks, stream);
  if (p.classes <= 256) return launch_rows<T, 32, 8>(p, blocks, stream);
  return launch_rows<T, kLossThreads, 0>(p, blocks, stream);
}

// Launch count_kernel if the loss needs sums of weights.
template <class T>
cudaError_t count(const CrossEntropy& p, cudaStream_t stream) {
  const bool wanted = p.target && (p.mean || (p.weight && p.smoothing > 0));
  if (!wanted || count_blocks(p) == 0) return cudaSuccess;
  return launch(count_kernel<Acc<T>>, dim3(count_blocks(p)), kLossThreads, 0, stream, p);
}

template <class T>
cudaError_t cross_entropy_of(const CrossEntropy& p, cudaStream_t stream) {
  cudaError_t status = p.counted ? cudaSuccess : count<T>(p, stream);
  if (status != cudaSuccess) return status;
  int64_t blocks = 0;
  status = cross_entropy_rows<T>(p, &blocks, stream);
  if (status != cudaSuccess || !p.reduced) return status;
  const double* counts = p.mean && p.target ? counts_of(p) : nullptr;
  return reduce_loss<T>(p.sums, blocks, counts, count_blocks(p), 1 / p.scale, p.reduced, stream);
}

}  // namespace

cudaError_t squared_error(const ElementwiseLoss& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto t) { return elementwise<decltype(t), SquaredError>(p, stream); });
}

cudaError_t gaussian_nll(const ElementwiseLoss& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto t) { return elementwise<decltype(t), GaussianNLL>(p, stream); });
}

cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto t) { return cross_entropy_of<decltype(t)>(p, stream); });
}

cudaError_t count_targets(const CrossEntropy& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto t) { return count<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
