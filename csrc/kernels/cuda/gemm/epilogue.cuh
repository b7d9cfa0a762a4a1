// The epilogue takes complete sums to memory: bias, activation or act' of the layer below, rounding, store. Also here
// are the kernels that add up slices.
#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mask.cuh"
#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// Elements of one 16-byte access.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// Load from[at] and the elements after it, as one pack.
template <class T, int kWidth>
DLK_DEVICE void load(const void* from, int64_t at, Acc<T> (&out)[kWidth]) {
  const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(from) + at);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out[e] = widen(pack.at[e]);
}

// Store v to to[at] and the elements after it, as one pack.
template <class T, int kWidth>
DLK_DEVICE void store(void* to, int64_t at, const Acc<T> (&v)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) narrow(v[e], &pack.at[e]);
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(to) + at) = pack;
}

// Store accumulators, or add them to those in memory if `adds`.
template <class A, int kWidth>
DLK_DEVICE void store_sums(void* to, int64_t at, bool adds, A (&v)[kWidth]) {
  constexpr int kCount = kWidth < kPack<A> ? kWidth : kPack<A>;
  auto* sums = static_cast<A*>(to) + at;
#pragma unroll
  for (int first = 0; first < kWidth; first += kCount) {
    auto* memory = reinterpret_cast<Pack<A, kCount>*>(sums + first);
    Pack<A, kCount> pack = adds ? *memory : Pack<A, kCount>{};
#pragma unroll
    for (int e = 0; e < kCount; ++e) pack.at[e] = adds ? pack.at[e] + v[first + e] : v[first + e];
    *memory = pack;
  }
}

// Load saved[at] and the elements after it, or the bits of a mask if `bits`: one element, or one pack.
template <class T, int kWidth>
DLK_DEVICE void load_saved(const void* saved, bool bits, int64_t at, Acc<T> (&out)[kWidth]) {
  if constexpr (kHasMask<T, kWidth>) {
    if (bits) return load_mask<T>(saved, at, out);
  }
  if constexpr (kWidth == 1)
    out[0] = saved_at<T>(saved, bits, at);
  else
    load<T>(saved, at, out);
}

// Return whether rows of C, and what the epilogue reads beside them, allow 16-byte packs.
template <class T>
DLK_DEVICE bool rows_allow_packs(const Gemm& p) {
  auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 == 0; };
  return p.n % kPack<T> == 0 && aligned(p.c) && aligned(p.z) && aligned(p.below_saved) && aligned(p.bias);
}

// Return whether rows of the f32 slices allow 16-byte packs.
DLK_DEVICE bool partials_allow_packs(const Gemm& p) {
  return p.n % 4 == 0 && reinterpret_cast<uintptr_t>(p.partials) % 16 == 0;
}

// Return whether p has no mask, or one that the epilogue can store with packs of C.
inline bool mask_fits(const Gemm& p) {
  return !p.mask ||
         (fills_mask_bytes(p.dtype, p.n, {p.c, p.bias}) && !p.z && !p.below_saved && p.output_mode == OutputMode::cast);
}

// Make C[i, j ... j + kWidth) from its sums and store it. `acc` keeps the stored values before rounding.
template <class T, int kWidth>
DLK_DEVICE void apply_epilogue(const Gemm& p, int64_t i, int64_t j, Acc<T> (&acc)[kWidth]) {
  using A = Acc<T>;
  using O = Ops<A>;
  const int64_t at = i * p.n + j;
  A operand[kWidth];
  if (p.bias) {
    load<T>(p.bias, j, operand);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) acc[e] += operand[e];
  }
  if (p.z) store<T>(p.z, at, acc);
  if (p.below_saved) {
    load_saved<T>(p.below_saved, p.below_is_mask, at, operand);
    with_activation(p.below_act.kind, [&](auto act) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        acc[e] = decltype(act)::template grad<O>(acc[e], operand[e], O::lit(p.below_act.slope));
    });
  } else if (!p.saved.data) {
    with_activation(p.act.kind, [&](auto act) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) acc[e] = decltype(act)::template value<O>(acc[e], O::lit(p.act.slope));
      if constexpr (kHasMask<T, kWidth> && decltype(act)::needs_sign_only) {
        if (p.mask) store_mask<decltype(act), T>(p.mask, at, acc);
      }
    });
  }
  if (p.output_mode == OutputMode::cast)
    store<T>(p.c, at, acc);
  else
    store_sums(p.c, at, p.output_mode == OutputMode::accumulate, acc);
}

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

// out[i] = Σ over slices of partials[slice, i], in a fixed order: 8 threads share an output, and each sums every eighth
// slice.
constexpr int kSumOutputs = 32, kSumSharers = 8;
template <class T>
DLK_DEVICE void sum_slices_block(const Acc<T>* partials, int64_t slices, int64_t count, T* out) {
  __shared__ double sums[kSumSharers][kSumOutputs];
  const int output = threadIdx.x % kSumOutputs, sharer = threadIdx.x / kSumOutputs;
  for (int64_t first = int64_t{blockIdx.x} * kSumOutputs; first < count; first += int64_t{gridDim.x} * kSumOutputs) {
    const int64_t i = first + output;
    double sum = 0;
    if (i < count)
      for (int64_t slice = sharer; slice < slices; slice += kSumSharers) sum += partials[slice * count + i];
    sums[sharer][output] = sum;
    __syncthreads();
    if (sharer == 0 && i < count) {
      for (int s = 1; s < kSumSharers; ++s) sum += sums[s][output];
      narrow(static_cast<Acc<T>>(sum), out + i);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kSumOutputs* kSumSharers)
    sum_slices_kernel(const Acc<T>* partials, int64_t slices, int64_t count, T* out) {
  sum_slices_block(partials, slices, count, out);
}

// Launch splitk_reduce_kernel.
template <class T>
cudaError_t splitk_reduce(const Gemm& p, cudaStream_t stream) {
  const dim3 grid(grid_of(ceil_div(p.m * p.n, kReduceThreads)));
  return launch(splitk_reduce_kernel<T>, grid, kReduceThreads, 0, stream, p);
}

// Launch sum_slices_kernel.
template <class T>
cudaError_t sum_slices(const void* partials, int64_t slices, int64_t count, void* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid(grid_of(ceil_div(count, kSumOutputs)));
  return launch(sum_slices_kernel<T>, grid, kSumOutputs * kSumSharers, 0, stream, static_cast<const Acc<T>*>(partials),
                slices, count, static_cast<T*>(out));
}

}  // namespace dlk::cuda
