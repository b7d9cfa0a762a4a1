// The activation pass: y = act(z) and its mask, behind a library's product.
#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {
namespace {

// 4 blocks per SM are 64 registers a thread. Without a bound sm_100a takes 32 and spills the erf of f64.
constexpr int kActThreads = 256;

template <class T>
__global__ void __launch_bounds__(kActThreads, 4) act_pass_kernel(const ActPass p) {
  using A = Acc<T>;
  const int64_t stride = int64_t{gridDim.x} * kActThreads, first = int64_t{blockIdx.x} * kActThreads + threadIdx.x;
  with_activation(p.act.kind, [&](auto act) {
    using Functor = decltype(act);
    auto apply = [&](int64_t from, int64_t to, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t at = from + first * kWidth; at < to; at += stride * kWidth) {
        A v[kWidth];
        load<T>(p.z, at, v);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) v[e] = Functor::template value<Ops<A>>(v[e], Ops<A>::lit(p.act.slope));
        if constexpr (kHasMask<T, kWidth> && Functor::needs_sign_only) {
          if (p.mask) store_mask<Functor, T>(p.mask, at, v);
        }
        store<T>(p.y, at, v);
      }
    };
    // Memory of the allocator is aligned, so all but the last few elements are handled 16 bytes at a time.
    const bool aligned = (reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.y)) % 16 == 0;
    const int64_t packed = aligned ? p.count / kPack<T> * kPack<T> : 0;
    apply(0, packed, std::integral_constant<int, kPack<T>>{});
    apply(packed, p.count, std::integral_constant<int, 1>{});
  });
}

template <class T>
cudaError_t run(const ActPass& p, cudaStream_t stream) {
  const dim3 grid(grid_of(ceil_div(p.count, kActThreads * kPack<T>)));
  return launch(act_pass_kernel<T>, grid, kActThreads, 0, stream, p);
}

}  // namespace

cudaError_t act_pass(DType dtype, const ActPass& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  if (p.mask && !fills_mask_bytes(dtype, p.count, {p.z, p.y})) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto t) { return run<decltype(t)>(p, stream); });
}

}  // namespace dlk::cuda
