// The pass of a gated layer's backward: the gradients of both preactivations and their column sums, from one read of g,
// gate and up. Blocks, slices and sums are those of grad_pass.cuh.
#include "kernels/cuda/elementwise/grad_pass_cut.h"
#include "kernels/cuda/elementwise/row_packs.cuh"
#include "kernels/cuda/gemm/slices.h"

namespace dlk::cuda {
namespace {

// One of the two results: dz, and the sums of its columns.
struct GluHalf {
  void* dz;
  void* dbias;
  void* partials;  // of this half; with several slices
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kGradPassThreads, kGradPassBlocks)
    glu_grad_pass_kernel(const GluGradPass p, const GluHalf of_gate, const GluHalf of_up, const GradPassCut cut) {
  using A = Acc<T>;
  using O = Ops<A>;
  __shared__ double sums[kWidth][kGradPassThreads];
  const int thread = threadIdx.x, lane = thread % cut.lanes, first = thread / cut.lanes;
  const int step = kGradPassThreads / cut.lanes;
  const bool g_in_packs = allows_packs<T, kWidth>(p.g), gate_in_packs = allows_packs<T, kWidth>(p.gate);
  const bool up_in_packs = allows_packs<T, kWidth>(p.up);

  for (int64_t block = blockIdx.x; block < cut.tiles * cut.slices; block += gridDim.x) {
    const int64_t slice = block / cut.tiles, j = (block % cut.tiles * cut.lanes + lane) * kWidth;
    const int64_t end = min(p.m, (slice + 1) * cut.rows);
    double total_gate[kWidth] = {}, total_up[kWidth] = {};
    for (int64_t i = slice * cut.rows + first; i < end && j < p.n; i += step) {
      A g[kWidth], gate[kWidth] = {}, up[kWidth] = {};
      load_packs<T>(p.g, i, j, g_in_packs, kWidth, g);
      if (p.gate.data) load_packs<T>(p.gate, i, j, gate_in_packs, kWidth, gate);
      if (p.up.data) load_packs<T>(p.up, i, j, up_in_packs, kWidth, up);
      with_activation(p.act.kind, [&](auto act) {
        using Functor = decltype(act);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const A slope = O::lit(p.act.slope), value = Functor::template value<O>(gate[e], slope);
          gate[e] = Functor::template grad<O>(g[e] * up[e], Functor::saves_output ? value : gate[e], slope);
          up[e] = g[e] * value;
        }
      });
#pragma unroll
      for (int e = 0; e < kWidth; ++e) total_gate[e] += gate[e], total_up[e] += up[e];
      auto keep = [&](void* dz, const A(&values)[kWidth]) {
        if (dz) store_packs<T>(dz, i * p.dz_pitch + j, allows_packs<T, kWidth>({dz, p.dz_pitch, 1}), kWidth, values);
      };
      keep(of_gate.dz, gate);
      keep(of_up.dz, up);
    }

    // Add up the rows of threads of this block, for one half after the other. Between them there is no barrier: after the last
    // one below a thread reads its own sums alone, and it overwrites no others.
    auto reduce = [&](const GluHalf& half, const double (&total)[kWidth]) {
      if (!half.dbias) return;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[e][thread] = total[e];
      __syncthreads();
      for (int rows = step / 2; rows > 0; rows /= 2) {
        if (first < rows)
          for (int e = 0; e < kWidth; ++e) sums[e][thread] += sums[e][thread + rows * cut.lanes];
        __syncthreads();
      }
      if (first != 0 || j >= p.n) return;
      for (int e = 0; e < kWidth; ++e) {
        const A sum = static_cast<A>(sums[e][thread]);
        if (cut.slices > 1)
          static_cast<A*>(half.partials)[slice * p.n + j + e] = sum;
        else
          narrow(sum, static_cast<T*>(half.dbias) + j + e);
      }
    };
    reduce(of_gate, total_gate);
    reduce(of_up, total_up);
  }
}

template <class T>
cudaError_t run(const GluGradPass& p, cudaStream_t stream) {
  const GradPassCut cut = cut_of(p.m, p.n, p.dtype);
  auto* const partials = static_cast<Acc<T>*>(p.partials);
  const GluHalf of_gate = {p.dz_gate, p.dbias_gate, partials};
  const GluHalf of_up = {p.dz_up, p.dbias_up, partials + (p.dbias_gate ? cut.slices * p.n : 0)};
  const bool wide = width_of(p.n, p.dtype) > 1;
  const cudaError_t status =
      launch(wide ? glu_grad_pass_kernel<T, kPack<T>> : glu_grad_pass_kernel<T, 1>,
             dim3(grid_of(cut.tiles * cut.slices)), kGradPassThreads, 0, stream, p, of_gate, of_up, cut);
  if (status != cudaSuccess || cut.slices == 1) return status;
  for (const GluHalf& half : {of_gate, of_up}) {
    if (!half.dbias) continue;
    const cudaError_t summed = sum_slices(p.dtype, half.partials, cut.slices, p.n, half.dbias, stream);
    if (summed != cudaSuccess) return summed;
  }
  return cudaSuccess;
}

}  // namespace

int64_t glu_grad_pass_partials(const GluGradPass& p) {
  const int64_t slices = cut_of(p.m, p.n, p.dtype).slices;
  return slices > 1 ? ((p.dbias_gate != nullptr) + (p.dbias_up != nullptr)) * slices * p.n : 0;
}

cudaError_t glu_grad_pass(const GluGradPass& p, cudaStream_t stream) {
  const bool dz = p.dz_gate || p.dz_up, dbias = p.dbias_gate || p.dbias_up;
  if (p.n == 0 || (!dz && !dbias) || (p.m == 0 && !dbias)) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto t) { return run<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
