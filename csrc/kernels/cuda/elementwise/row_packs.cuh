// Loads and stores of neighbouring elements of a row, in 16-byte packs where the memory allows it.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

// Elements of one access to kWidth neighbours: at most 16 bytes.
template <class T, int kWidth>
constexpr int kPackOf = kWidth < kPack<T> ? kWidth : kPack<T>;

// Return whether packs can access kWidth elements of v from every multiple of kWidth on.
template <class T, int kWidth>
DLK_DEVICE bool allows_packs(const View& v) {
  constexpr uintptr_t kBytes = kPackOf<T, kWidth> * sizeof(T);
  return v.col_stride == 1 && v.row_stride % kWidth == 0 && reinterpret_cast<uintptr_t>(v.data) % kBytes == 0;
}

// Return the first `valid` of kWidth elements; the others are 0. `in_packs` is allows_packs(v).
template <class T, int kWidth>
DLK_DEVICE Pack<T, kWidth> load_run(const View& v, int64_t row, int64_t col, bool in_packs, int64_t valid) {
  static_assert(kWidth <= kPack<T>);
  const T* from = static_cast<const T*>(v.data) + row * v.row_stride + col * v.col_stride;
  if (kWidth > 1 && in_packs && valid >= kWidth) return *reinterpret_cast<const Pack<T, kWidth>*>(from);
  Pack<T, kWidth> run{};
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    if (e < valid) run.at[e] = from[e * v.col_stride];
  return run;
}
// The same, widened.
template <class T, int kWidth>
DLK_DEVICE void load_packs(const View& v, int64_t row, int64_t col, bool in_packs, int64_t valid,
                           Acc<T> (&out)[kWidth]) {
  widen(load_run<T, kWidth>(v, row, col, in_packs, valid), out);
}

// Store the first `valid` of kWidth elements to contiguous memory. `in_packs` is allows_packs of it.
template <class T, int kWidth>
DLK_DEVICE void store_packs(void* to, int64_t at, bool in_packs, int64_t valid, const Acc<T> (&v)[kWidth]) {
  T* out = static_cast<T*>(to) + at;
  if (in_packs && valid >= kWidth) {
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
      if (e < valid) narrow(v[e], out + e);
  }
}

}  // namespace dlk::cuda
