// Runs of neighbours along a row of a view, in 16-byte accesses where the view lies so; and sums over a block.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

// Elements of one access of a run: at most 16 bytes.
template <class T, int kWidth>
constexpr int kPackOf = kWidth < kPack<T> ? kWidth : kPack<T>;

// Whether every run of kWidth elements from a multiple of kWidth on can be accessed in pieces.
template <class T, int kWidth>
DLK_DEVICE bool allows_packs(const View& v) {
  constexpr uintptr_t kBytes = kPackOf<T, kWidth> * sizeof(T);
  return v.col_stride == 1 && v.row_stride % kWidth == 0 && reinterpret_cast<uintptr_t>(v.data) % kBytes == 0;
}

// The first `left` of kWidth elements; the others are 0.
template <class T, int kWidth>
DLK_DEVICE void load_packs(const View& v, int64_t row, int64_t col, bool in_packs, int64_t left,
                           Acc<T> (&out)[kWidth]) {
  const T* from = static_cast<const T*>(v.data) + row * v.row_stride + col * v.col_stride;
  if (in_packs && left >= kWidth) {
    constexpr int kCount = kPackOf<T, kWidth>;
#pragma unroll
    for (int piece = 0; piece < kWidth; piece += kCount) {
      const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from + piece);
#pragma unroll
      for (int e = 0; e < kCount; ++e) out[piece + e] = widen(pack.at[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) out[e] = e < left ? widen(from[e * v.col_stride]) : Acc<T>(0);
  }
}

// Stores the first `left` of kWidth elements to contiguous memory.
template <class T, int kWidth>
DLK_DEVICE void store_packs(void* to, int64_t at, bool in_packs, int64_t left, const Acc<T> (&v)[kWidth]) {
  T* out = static_cast<T*>(to) + at;
  if (in_packs && left >= kWidth) {
    constexpr int kCount = kPackOf<T, kWidth>;
#pragma unroll
    for (int piece = 0; piece < kWidth; piece += kCount) {
      Pack<T, kCount> pack;
#pragma unroll
      for (int e = 0; e < kCount; ++e) narrow(v[piece + e], &pack.at[e]);
      *reinterpret_cast<Pack<T, kCount>*>(out + piece) = pack;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      if (e < left) narrow(v[e], out + e);
  }
}

// What kSize neighbouring threads agree on: lanes of a warp, or a whole block of more than one.
template <int kSize>
struct Team {
  static_assert(kSize > 0 && (kSize <= 32 ? 32 % kSize : kSize % 32) == 0);
  static constexpr int kLanes = kSize < 32 ? kSize : 32, kWarps = kSize / kLanes;

  // Every thread gets the same value, combined in the same order.
  template <class V, class F>
  DLK_DEVICE static V combined(V v, F&& f) {
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) v = f(v, __shfl_xor_sync(0xffffffffu, v, other));
    if constexpr (kWarps > 1) {
      __shared__ V of_warp[kWarps];
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
      __syncthreads();
      v = of_warp[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) v = f(v, of_warp[warp]);
      __syncthreads();  // before the next call overwrites it
    }
    return v;
  }
  template <class V>
  DLK_DEVICE static V sum(V v) {
    return combined(v, [](V a, V b) { return a + b; });
  }
  // A NaN is no maximum.
  template <class V>
  DLK_DEVICE static V max(V v) {
    return combined(v, [](V a, V b) { return b > a ? b : a; });
  }
};

}  // namespace dlk::cuda
