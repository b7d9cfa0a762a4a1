// The epilogue takes complete sums to memory: bias, activation or act' of the layer below, rounding, store.
#pragma once

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mask.cuh"
#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// Elements of one 16-byte access.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int kWidth>
DLK_DEVICE void widen(const Pack<T, kWidth>& pack, Acc<T> (&out)[kWidth]) {
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out[e] = widen(pack.at[e]);
}

// Load from[at] and the elements after it, as one pack.
template <class T, int kWidth>
DLK_DEVICE void load(const void* from, int64_t at, Acc<T> (&out)[kWidth]) {
  widen(*reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(from) + at), out);
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
DLK_HD bool rows_allow_packs(const Gemm& p) {
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
  const int64_t at = i * p.n + j;
  Acc<T> operand[kWidth];
  if (p.bias) {
    load<T>(p.bias, j, operand);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) acc[e] += operand[e];
  }
  if (p.z) store<T>(p.z, at, acc);
  if (p.below_saved) {
    load_saved<T>(p.below_saved, p.below_is_mask, at, operand);
    activation_gradient(p.below_act, acc, operand);
  } else if (!p.saved.data) {
    activate(p.act, acc);
    if constexpr (kHasMask<T, kWidth>) {
      if (p.mask) store_mask_of<T>(p.act.kind, p.mask, at, acc);
    }
  }
  if (p.output_mode == OutputMode::cast)
    store<T>(p.c, at, acc);
  else
    store_sums(p.c, at, p.output_mode == OutputMode::accumulate, acc);
}

}  // namespace dlk::cuda
