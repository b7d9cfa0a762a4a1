// The pass of a gated layer's forward: y = act(gate) · up, behind two products.
#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {
namespace {

constexpr int kGluThreads = 256;

template <class T>
__global__ void __launch_bounds__(kGluThreads, 4) glu_pass_kernel(const GluPass p) {
  using A = Acc<T>;
  using O = Ops<A>;
  const int64_t stride = int64_t{gridDim.x} * kGluThreads, first = int64_t{blockIdx.x} * kGluThreads + threadIdx.x;
  with_activation(p.act.kind, [&](auto act) {
    using Functor = decltype(act);
    auto apply = [&](int64_t from, int64_t to, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t at = from + first * kWidth; at < to; at += stride * kWidth) {
        A gate[kWidth], up[kWidth];
        load<T>(p.gate, at, gate);
        load<T>(p.up, at, up);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) up[e] *= Functor::template value<O>(gate[e], O::lit(p.act.slope));
        store<T>(p.y, at, up);
      }
    };
    // Memory of the allocator is aligned, so all but the last few elements are handled 16 bytes at a time.
    const uintptr_t addresses =
        reinterpret_cast<uintptr_t>(p.gate) | reinterpret_cast<uintptr_t>(p.up) | reinterpret_cast<uintptr_t>(p.y);
    const int64_t packed = addresses % 16 == 0 ? p.count / kPack<T> * kPack<T> : 0;
    apply(0, packed, std::integral_constant<int, kPack<T>>{});
    apply(packed, p.count, std::integral_constant<int, 1>{});
  });
}

template <class T>
cudaError_t run(const GluPass& p, cudaStream_t stream) {
  const dim3 grid(grid_of(ceil_div(p.count, kGluThreads * kPack<T>)));
  return launch(glu_pass_kernel<T>, grid, kGluThreads, 0, stream, p);
}

}  // namespace

cudaError_t glu_pass(DType dtype, const GluPass& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto t) { return run<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
