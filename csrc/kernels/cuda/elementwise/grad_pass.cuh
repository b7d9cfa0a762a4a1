// The gradient pass: dz = g · act'(saved) and dbias = Σ dz over rows, from one read of g and saved. It runs in front of
// a library's product, which reads dz from memory, and where no product adds up dbias.
//
// A block takes a few columns and a slice of the rows. Its threads form rows × lanes. A thread sums the dz that it
// makes, and adds every kBatch rows in f64. Then the block adds up its rows of threads, and sum_slices adds up the
// slices. The order is fixed, and the cuts depend on the shape alone.
#pragma once

#include <type_traits>

#include "kernels/cuda/elementwise/grad_pass_cut.h"
#include "kernels/cuda/elementwise/row_packs.cuh"

namespace dlk::cuda {

template <class T, int kWidth>
__global__ void __launch_bounds__(kGradPassThreads, kGradPassBlocks)
    grad_pass_kernel(const GradPass p, const GradPassCut cut) {
  using A = Acc<T>;
  using O = Ops<A>;
  constexpr int kBatch = sizeof(T) == 4 ? 2 : 1;  // rows that a thread loads at once: as many as registers allow
  __shared__ double sums[kWidth][kGradPassThreads];
  const int thread = threadIdx.x, lane = thread % cut.lanes, first = thread / cut.lanes;
  const int step = kGradPassThreads / cut.lanes;
  const bool g_in_packs = allows_packs<T, kWidth>(p.g), saved_in_packs = allows_packs<T, kWidth>(p.saved);
  const bool dz_in_packs = allows_packs<T, kWidth>({p.dz, p.n, 1});

  for (int64_t block = blockIdx.x; block < cut.tiles * cut.slices; block += gridDim.x) {
    const int64_t slice = block / cut.tiles, j = (block % cut.tiles * cut.lanes + lane) * kWidth;
    const int64_t end = min(p.m, (slice + 1) * cut.rows);
    double total[kWidth] = {};
    with_activation(p.act.kind, [&](auto act) {
      constexpr bool kReadsSaved = !std::is_same_v<decltype(act), Identity>;
      for (int64_t i = slice * cut.rows + first; i < end && j < p.n; i += step * kBatch) {
        A g[kBatch][kWidth], saved[kBatch][kWidth] = {}, sum[kWidth] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t row = i + b * step;
          if (row >= end) continue;
          load_packs<T>(p.g, row, j, g_in_packs, kWidth, g[b]);
          if constexpr (kHasMask<T, kWidth> && decltype(act)::needs_sign_only) {
            if (p.saved_is_mask) {
              load_mask<T>(p.saved.data, row * p.n + j, saved[b]);
              continue;
            }
          }
          if constexpr (kReadsSaved) load_packs<T>(p.saved, row, j, saved_in_packs, kWidth, saved[b]);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t row = i + b * step;
          if (row >= end) continue;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            g[b][e] = decltype(act)::template grad<O>(g[b][e], saved[b][e], O::lit(p.act.slope));
            sum[e] += g[b][e];
          }
          if (p.dz) store_packs<T>(p.dz, row * p.n + j, dz_in_packs, kWidth, g[b]);
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[e] += sum[e];
      }
    });
    if (!p.dbias) continue;

#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums[e][thread] = total[e];
    __syncthreads();
    for (int half = step / 2; half > 0; half /= 2) {
      if (first < half)
        for (int e = 0; e < kWidth; ++e) sums[e][thread] += sums[e][thread + half * cut.lanes];
      __syncthreads();
    }
    if (first != 0 || j >= p.n) continue;
    for (int e = 0; e < kWidth; ++e) {
      const A sum = static_cast<A>(sums[e][thread]);
      if (cut.slices > 1)
        static_cast<A*>(p.partials)[slice * p.n + j + e] = sum;
      else if (p.output_mode == OutputMode::cast)
        narrow(sum, static_cast<T*>(p.dbias) + j + e);
      else
        static_cast<A*>(p.dbias)[j + e] = sum;
    }
  }
}

}  // namespace dlk::cuda
