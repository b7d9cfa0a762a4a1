// The gradient pass: dz = g · act'(saved) and dbias = Σ dz over rows, from one read of g and saved. It runs in front of
// a library's product, which reads dz from memory, and where no product adds up dbias.
//
// A block takes a few columns and a slice of the rows. Its threads form rows × lanes. A thread sums the dz that it
// makes, and adds every two rows in f64. Then the block adds up its rows of threads, and sum_slices adds up the
// slices. The order is fixed, and the cuts depend on the shape alone.
#pragma once

#include <type_traits>

#include "kernels/cuda/elementwise/grad_pass_cut.h"
#include "kernels/cuda/elementwise/row_packs.cuh"

namespace dlk::cuda {

enum class Saved { nothing, bits, elements };
template <Saved kSaved>
using Reads = std::integral_constant<Saved, kSaved>;

template <class T, int kWidth>
__global__ void __launch_bounds__(kGradPassThreads, kGradPassBlocks)
    grad_pass_kernel(const GradPass p, const GradPassCut cut) {
  using A = Acc<T>;
  using O = Ops<A>;
  __shared__ double sums[kWidth][kGradPassThreads];
  const int thread = threadIdx.x, lane = thread % cut.lanes, first = thread / cut.lanes;
  const int step = kGradPassThreads / cut.lanes;
  const bool g_in_packs = allows_packs<T, kWidth>(p.g), saved_in_packs = allows_packs<T, kWidth>(p.saved);
  const bool dz_in_packs = allows_packs<T, kWidth>({p.dz, p.n, 1});

  for (int64_t block = blockIdx.x; block < cut.tiles * cut.slices; block += gridDim.x) {
    const int64_t slice = block / cut.tiles, j = (block % cut.tiles * cut.lanes + lane) * kWidth;
    const int64_t end = min(p.m, (slice + 1) * cut.rows);
    double total[kWidth] = {};
    // `reads` says what the derivative of the activation reads: nothing, bits of a mask, or elements. A thread loads all
    // rows of a batch before it uses the first, so 64 bytes of loads are under way. Then it calls gradient(g, saved) for
    // one row after the other. A long gradient has one copy of its code.
    auto add_up = [&](auto reads, auto&& gradient) {
      constexpr Saved kReads = decltype(reads)::value;
      constexpr int kBatch = kReads == Saved::elements ? 2 : 4, kCopies = kReads == Saved::elements ? 1 : kBatch;
      for (int64_t i = slice * cut.rows + first; i < end && j < p.n; i += step * kBatch) {
        Pack<T, kWidth> loaded[kBatch] = {}, read[kBatch] = {};
        unsigned bits[kBatch] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t row = i + b * step;
          if (row >= end) continue;
          loaded[b] = load_run<T, kWidth>(p.g, row, j, g_in_packs, kWidth);
          if constexpr (kReads == Saved::bits) bits[b] = mask_byte(p.saved.data, row * p.n + j);
          if constexpr (kReads == Saved::elements)
            read[b] = load_run<T, kWidth>(p.saved, row, j, saved_in_packs, kWidth);
        }
        A sum[kWidth] = {};
#pragma unroll kCopies
        for (int b = 0; b < kBatch && i + b * step < end; ++b) {
          A g[kWidth], saved[kWidth];
          widen(loaded[0], g);
          if constexpr (kReads == Saved::bits)
            widen_mask<T>(bits[0], saved);
          else
            widen(read[0], saved);
          gradient(g, saved);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] += g[e];
          if (b % 2 == 1) {  // two rows are a sum, so that bits and elements give the same bits
#pragma unroll
            for (int e = 0; e < kWidth; ++e) total[e] += sum[e], sum[e] = 0;
          }
          if (p.dz) store_packs<T>(p.dz, (i + b * step) * p.n + j, dz_in_packs, kWidth, g);
#pragma unroll
          for (int next = 1; next < kBatch; ++next)  // registers cannot be indexed at run time
            loaded[next - 1] = loaded[next], read[next - 1] = read[next], bits[next - 1] = bits[next];
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[e] += sum[e];
      }
    };
    auto with = [&](auto act, A(&g)[kWidth], const A(&saved)[kWidth]) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) g[e] = decltype(act)::template grad<O>(g[e], saved[e], O::lit(p.act.slope));
    };
    bool done = false;
    if constexpr (kHasMask<T, kWidth>) {
      if (p.saved_is_mask) {
        done = true;
        add_up(Reads<Saved::bits>{}, [&](A(&g)[kWidth], const A(&saved)[kWidth]) {
          with_comparison(p.act.kind, [&](auto act) { with(act, g, saved); });
        });
      }
    }
    if (!done && p.act.kind == Act::none)
      add_up(Reads<Saved::nothing>{}, [](A(&)[kWidth], const A(&)[kWidth]) {});
    else if (!done)
      add_up(Reads<Saved::elements>{}, [&](A(&g)[kWidth], const A(&saved)[kWidth]) {
        with_activation(p.act.kind, [&](auto act) { with(act, g, saved); });
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
