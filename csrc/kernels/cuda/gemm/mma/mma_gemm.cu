// The launcher of mma_gemm.cuh: the switch from dtype, layout and size to a kernel.
#include "kernels/cuda/gemm/mma/mma_gemm.cuh"
#include "kernels/cuda/gemm/slices.h"
#include "kernels/cuda/gemm/waves.h"

#include <algorithm>

namespace dlk::cuda {
namespace {

constexpr int kLarge = 128, kSmall = 64;
int tile_of(const Gemm& p) {
  if (p.tile) return p.tile;
  auto tiles = [&](int side) { return ceil_div(p.m, side) * ceil_div(p.n, side) * p.splits; };
  return takes_large(tiles(kLarge), tiles(kSmall), 4, processors()) ? kLarge : kSmall;
}

template <class Traits>
cudaError_t run(const Gemm& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.m, Traits::kTileM) * ceil_div(p.n, Traits::kTileN);
  if (tiles > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(p.splits));
  cudaError_t status = launch(mma_gemm_kernel<Traits>, grid, Traits::kThreads, Traits::kSharedBytes, stream, p);
  if (status != cudaSuccess) return status;
  if (p.column_sum) return sum_slices(p.dtype, p.partials, ceil_div(p.m, Traits::kWarpM), p.n, p.column_sum, stream);
  if (p.splits == 1) return status;

  status = splitk_reduce(p, stream);
  if (status != cudaSuccess || !p.row_sum) return status;
  return sum_slices(p.dtype, static_cast<const float*>(p.partials) + p.splits * p.m * p.n, p.splits, p.m, p.row_sum,
                    stream);
}

// Choose the kernel by the layout of the operands. Layouts that no product of a layer has are loaded element by
// element.
template <class T, int kTile>
cudaError_t run_tile(const Gemm& p, cudaStream_t stream) {
  constexpr int kWarp = kTile / 2;
  const bool a_along_k = !p.saved.data && !p.row_sum && p.a.row_stride != 1, b_along_k = p.b.row_stride == 1;
  if (!a_along_k) return run<MmaTraits<T, false, false, kWarp, kWarp>>(p, stream);  // wgrad
  if (b_along_k) return run<MmaTraits<T, true, true, kWarp, kWarp>>(p, stream);     // forward
  return run<MmaTraits<T, true, false, kWarp, kWarp>>(p, stream);                   // dgrad
}

template <class T>
cudaError_t run_dtype(const Gemm& p, cudaStream_t stream) {
  return tile_of(p) == kLarge ? run_tile<T, kLarge>(p, stream) : run_tile<T, kSmall>(p, stream);
}

}  // namespace

cudaError_t mma_gemm(const Gemm& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return p.row_sum ? cudaErrorInvalidValue : cudaSuccess;  // row sums alone: grad_pass
  if (!is_16_bit(p.dtype) || (p.column_sum && (p.splits != 1 || !p.below_saved)) || !mask_fits(p))
    return cudaErrorInvalidValue;
  if (p.tile != 0 && p.tile != kSmall && p.tile != kLarge) return cudaErrorInvalidValue;
  return p.dtype == DType::bf16 ? run_dtype<Bf16>(p, stream) : run_dtype<F16>(p, stream);
}

bool mma_takes_fast(const View& operand) {
  constexpr int64_t pack = 8;
  const bool rows = operand.col_stride == 1 && operand.row_stride % pack == 0;
  const bool cols = operand.row_stride == 1 && operand.col_stride % pack == 0;
  return (rows || cols) && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

int64_t partials_size(const Gemm& p) {
  if (p.column_sum) return ceil_div(p.m, kSmall / 2) * p.n;
  return p.splits > 1 ? p.splits * (p.m * p.n + p.m) : 0;
}

int gemm_splits(int64_t m, int64_t n, int64_t k) {
  // About 512 blocks fill the largest devices a few times. A slice keeps at least 1024 steps, so that storing and
  // summing its partial C costs little beside computing it.
  const int64_t tiles = std::max<int64_t>(1, ceil_div(m, 64) * ceil_div(n, 64));
  return static_cast<int>(std::max<int64_t>(1, std::min(512 / tiles, k / 1024)));
}

int few_rows_splits(int64_t m, int64_t n, int64_t k) {
  // One row of tiles reads the weight once. About 128 blocks are one for each SM of a large device; with slices of at
  // least 512 steps they have more to read than the second launch, which adds up the slices, costs.
  if (m > 64) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min(128 / std::max<int64_t>(1, ceil_div(n, 64)), k / 512)));
}

}  // namespace dlk::cuda
