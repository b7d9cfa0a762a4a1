// Launches gemm.cuh: the switch from run-time dtype and activation to a kernel, grid sizes, statuses.
#include "gemm.cuh"

#include <algorithm>
#include <limits>

namespace dlk::cuda {
namespace {

// Kernels walk their work in strides of the grid, so a grid larger than the hardware's is only cut short.
unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <class T>
cudaError_t sum_slices(const Acc<T>* partials, int slices, int64_t count, void* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(grid_of(ceil_div(count, kSumThreads)));
  return launch(sum_slices_kernel<T>, grid, kSumThreads, stream, partials, slices, count, static_cast<T*>(out));
}

template <class Traits>
cudaError_t run(const Gemm& p, cudaStream_t stream) {
  using T = typename Traits::T;
  const int64_t tiles = ceil_div(p.m, Traits::kTileM) * std::max<int64_t>(1, ceil_div(p.n, Traits::kTileN));
  const dim3 grid(grid_of(tiles), 1, static_cast<unsigned>(p.splits));
  cudaError_t status = launch(gemm_kernel<Traits>, grid, Traits::kThreads, stream, p);
  if (status != cudaSuccess || p.splits == 1) return status;

  const auto* partials = static_cast<const Acc<T>*>(p.partials);
  status = sum_slices<T>(partials, p.splits, p.m * p.n, p.c, stream);
  if (status != cudaSuccess || !p.row_sum) return status;
  return sum_slices<T>(partials + p.splits * p.m * p.n, p.splits, p.m, p.row_sum, stream);
}

template <class T>
cudaError_t gemm_of(const Gemm& p, cudaStream_t stream) {
  return with_activation(p.act.kind, [&](auto act) {
    using Act = decltype(act);
    return p.saved.data ? run<GemmTraits<T, Act, true>>(p, stream) : run<GemmTraits<T, Act, false>>(p, stream);
  });
}

}  // namespace

cudaError_t gemm(const Gemm& p, cudaStream_t stream) {
  if (p.m == 0 || (p.n == 0 && !p.row_sum)) return cudaSuccess;
  switch (p.dtype) {
    case DType::f64: return gemm_of<double>(p, stream);
    case DType::f32: return gemm_of<float>(p, stream);
    case DType::bf16: return gemm_of<Bf16>(p, stream);
    case DType::f16: return gemm_of<F16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

int gemm_splits(int64_t m, int64_t n, int64_t k) {
  // About 512 blocks fill the largest devices a few times over; a slice keeps at least 1024 steps, which makes
  // writing and summing its partial C cheap beside computing it.
  const int64_t tiles = std::max<int64_t>(1, ceil_div(m, 64) * ceil_div(n, 64));
  return static_cast<int>(std::max<int64_t>(1, std::min(512 / tiles, k / 1024)));
}

}  // namespace dlk::cuda
