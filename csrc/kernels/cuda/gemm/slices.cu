// Adds up slices: those of a product, in front of its epilogue, and those of row and column sums.
#include "kernels/cuda/gemm/slices.h"

#include "kernels/cuda/gemm/slices.cuh"

namespace dlk::cuda {
namespace {

// C = epilogue(Σ over slices of partials[splits, m, n]). With 3 blocks per SM a thread has 85 registers. Without a
// bound sm_100a takes 32 and spills the erf of f64.
constexpr int kReduceThreads = 256;
template <class T>
__global__ void __launch_bounds__(kReduceThreads, 3) splitk_reduce_kernel(const Gemm p) {
  using A = Acc<T>;
  const auto* partials = static_cast<const A*>(p.partials);
  const int64_t stride = int64_t{gridDim.x} * kReduceThreads,
                first = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  const bool aligned = reinterpret_cast<uintptr_t>(partials) % 16 == 0;
  auto reduce = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t at = first * kWidth; at < p.m * p.n; at += stride * kWidth) {
      A acc[kWidth] = {};
      for (int slice = 0; slice < p.splits; ++slice) {
        const A* from = partials + slice * p.m * p.n + at;
        if constexpr (kWidth % kPack<A> == 0) {
          if (aligned) {
#pragma unroll
            for (int e = 0; e < kWidth; e += kPack<A>) {
              const auto pack = *reinterpret_cast<const Pack<A, kPack<A>>*>(from + e);
#pragma unroll
              for (int i = 0; i < kPack<A>; ++i) acc[e + i] += pack.at[i];
            }
            continue;
          }
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) acc[e] += from[e];
      }
      apply_epilogue<T>(p, at / p.n, at % p.n, acc);
    }
  };
  if (rows_allow_packs<T>(p))
    reduce(std::integral_constant<int, kPack<T>>{});
  else
    reduce(std::integral_constant<int, 1>{});
}

template <class T>
__global__ void __launch_bounds__(kSumOutputs* kSumSharers)
    sum_slices_kernel(const Acc<T>* partials, int64_t slices, int64_t count, T* out) {
  sum_slices_block(partials, slices, count, out);
}

}  // namespace

cudaError_t splitk_reduce(const Gemm& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int width = rows_allow_packs<T>(p) ? kPack<T> : 1;  // of C per thread
    const dim3 grid(grid_of(ceil_div(p.m * p.n, kReduceThreads * width)));
    return launch(splitk_reduce_kernel<T>, grid, kReduceThreads, 0, stream, p);
  });
}

cudaError_t sum_slices(DType dtype, const void* partials, int64_t slices, int64_t count, void* out,
                       cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(grid_of(ceil_div(count, kSumOutputs)));
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(sum_slices_kernel<T>, grid, kSumOutputs * kSumSharers, 0, stream,
                  static_cast<const Acc<T>*>(partials), slices, count, static_cast<T*>(out));
  });
}

}  // namespace dlk::cuda
