// Mask bits: forward stores one for each element of y, and backward reads them where it would read y, a sixteenth of
// the bytes. What is read becomes 1 or 0, with which the functor gives the gradient that y itself would.
#pragma once

#include <initializer_list>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// One byte of the mask has the bits of as many elements as one 16-byte access of 16 bits each.
template <class T, int kWidth>
constexpr bool kHasMask = sizeof(T) == 2 && kWidth == kMaskBits;

// Whether elements in rows of n come by the byte of a mask, in 16-byte accesses to all of `memory`.
inline bool fills_mask_bytes(DType dtype, int64_t n, std::initializer_list<const void*> memory) {
  bool whole = (dtype == DType::bf16 || dtype == DType::f16) && n % kMaskBits == 0;
  for (const void* p : memory) whole = whole && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return whole;
}

// y as memory has it: a value that rounds to 0 is inactive.
template <class Functor, class T>
DLK_DEVICE bool is_active_rounded(Acc<T> y) {
  T rounded;
  narrow(y, &rounded);
  return is_active<Functor, Ops<Acc<T>>>(widen(rounded));
}

// The byte of y[at ... at + 8), at a multiple of 8.
template <class Functor, class T, int kWidth>
DLK_DEVICE void store_mask(void* mask, int64_t at, const Acc<T> (&y)[kWidth]) {
  static_assert(kHasMask<T, kWidth>);
  unsigned bits = 0;
#pragma unroll
  for (int e = 0; e < kMaskBits; ++e) bits |= static_cast<unsigned>(is_active_rounded<Functor, T>(y[e])) << e;
  static_cast<uint8_t*>(mask)[at / kMaskBits] = static_cast<uint8_t>(bits);
}

template <class T, int kWidth>
DLK_DEVICE void load_mask(const void* mask, int64_t at, Acc<T> (&out)[kWidth]) {
  static_assert(kHasMask<T, kWidth>);
  const unsigned bits = static_cast<const uint8_t*>(mask)[at / kMaskBits];
#pragma unroll
  for (int e = 0; e < kMaskBits; ++e) out[e] = static_cast<Acc<T>>(bits >> e & 1);
}

// saved[at]; or 1 or 0 from its mask.
template <class T>
DLK_DEVICE Acc<T> saved_at(const void* saved, bool bits, int64_t at) {
  if (bits) return static_cast<Acc<T>>(static_cast<const uint8_t*>(saved)[at / kMaskBits] >> at % kMaskBits & 1);
  return widen(static_cast<const T*>(saved)[at]);
}

}  // namespace dlk::cuda
